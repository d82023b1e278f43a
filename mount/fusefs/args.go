package fusefs

import (
	"context"
	"flag"
	"fmt"
	"os"
)

// ServeArgs runs a server with the arguments that Driver adds to its command line. The daxfs program
// has options with the same names; ServeArgs is for programs without a command line of their own, such
// as tests.
func ServeArgs(args []string) error {
	f := flag.NewFlagSet("fuse server", flag.ContinueOnError)
	off, size := f.Int64("offset", 0, ""), f.Int64("size", 0, "")
	name, fd := f.String("name", "", ""), f.Int("ready-fd", -1, "")
	suid := f.Bool("suid", false, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 2 || *fd < 3 {
		return fmt.Errorf("fuse server: got %q, expected the arguments of fusefs.Driver", args)
	}
	c := Config{Path: f.Arg(0), Dir: f.Arg(1), Name: *name, Off: *off, Size: *size, Restrict: !*suid}
	return Run(context.Background(), c, func(err error) { Ready(os.NewFile(uintptr(*fd), "ready"), err) })
}
