// Command daxfs makes images that both EROFS and DAXFS mount, and looks into them.
//
// Each sub-command is one file, which registers itself; adding a command is adding a file. Standard output carries what
// was asked for, standard error what is said about it. The exit status is
//
//	0    done
//	1    an error
//	2    wrong use
//	3    verify, pool check or doctor found something wrong
//	130  interrupted by SIGINT, SIGTERM or SIGHUP
//
// A command that fails leaves no output file behind, and one that was there as it was.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Exit statuses.
const (
	statusOK          = 0
	statusFailed      = 1
	statusUsage       = 2
	statusFindings    = 3
	statusInterrupted = 130
)

func main() {
	interrupts := []os.Signal{os.Interrupt, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) { // nohup(1) ignores it
		interrupts = append(interrupts, unix.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), interrupts...)
	// A second ^C ends the process at once.
	context.AfterFunc(ctx, stop)
	tuneMemory()
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// tuneMemory makes the collector run when the heap has grown by a quarter, unless GOGC says otherwise. A command that
// keeps something for each of a million files would else need twice the memory, and saves only a tenth of its time.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
}

// run is the program. args[0] is its name.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if asksAfterDashes(args) {
		return statusOK
	}
	out := &output{Writer: stdout}
	app := newApp(&env{stdin: stdin, stdout: out, stderr: stderr})
	args = humanSizes(askHelp(args, app.Commands))
	err := app.RunContext(ctx, reorder(args, app.Flags, app.Commands))
	if err == nil {
		err = out.err
	}
	var usage *usageError
	switch {
	case err == nil:
		return statusOK
	case errors.Is(err, errFindings):
		return statusFindings
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "daxfs: interrupted")
		return statusInterrupted
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "daxfs: %s\n", message(err))
		if usage.command != "" {
			fmt.Fprintf(stderr, "Try: daxfs %s --help\n", usage.command)
		} else {
			fmt.Fprintln(stderr, "Try: daxfs --help")
		}
		return statusUsage
	}
	fmt.Fprintf(stderr, "daxfs: %s\n", message(err))
	return statusFailed
}

// errFindings ends a command that did what it should and found something wrong, which it has said.
var errFindings = errors.New("something is wrong")

// usageError is wrong use of a command.
type usageError struct {
	command string
	msg     string
}

func (e *usageError) Error() string {
	if e.command == "" {
		return e.msg
	}
	return e.command + ": " + e.msg
}
