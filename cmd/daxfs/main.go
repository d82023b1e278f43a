// Command daxfs makes images that both EROFS and DAXFS mount, and inspects them.
//
// Each command is one file, which registers itself; to add a command, add a file. Results go to
// standard output, messages to standard error. The exit status is
//
//	0    done
//	1    an error
//	2    wrong use
//	3    verify, pool check or doctor found something wrong
//	130  interrupted by SIGINT, SIGTERM or SIGHUP
//
// A command that fails leaves no new output file behind, and an existing one unchanged.
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

// tuneMemory runs the collector whenever the heap has grown by a quarter, unless GOGC is set. With the
// default a command with data about each of a million files would need twice the memory, and run only a tenth faster.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
}

// run runs the program. args[0] is its name.
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

// errFindings ends a command that worked, found something wrong and reported it.
var errFindings = errors.New("something is wrong")

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
