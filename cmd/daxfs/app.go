package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/internal/version"
)

// env is a command's access to the outside, apart from its files.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
}

// registered holds the commands of all files; it does not change after initialisation.
var registered []registration

type registration struct {
	order int
	make  func(*env) *cli.Command
}

// register adds a command. Files call it from init. Commands are listed by order.
func register(order int, f func(*env) *cli.Command) {
	registered = append(registered, registration{order, f})
}

func newApp(e *env) *cli.App {
	slices.SortStableFunc(registered, func(a, b registration) int { return cmp.Compare(a.order, b.order) })
	app := &cli.App{
		Name:     "daxfs",
		HelpName: "daxfs",
		Usage:    "container images that machines, kernels and processes share in memory",
		Version:  version.String(),
		Description: "Exit status: 0 done; 1 an error; 2 wrong use; 3 verify, pool check or doctor found something\n" +
			"wrong; 130 interrupted. Flags may stand before and after arguments. Every command has examples:\n" +
			"daxfs help COMMAND, or daxfs COMMAND --help",
		HideHelpCommand:      true,
		EnableBashCompletion: true,
		BashComplete:         suggest,
		Reader:               e.stdin,
		Writer:               e.stdout,
		ErrWriter:            e.stderr,
		// run prints the error and chooses the status.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
		// Only --help beside arguments gets here: the library takes the arguments for command names to explain.
		CommandNotFound: func(c *cli.Context, _ string) { _ = cli.ShowSubcommandHelp(c) },
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return wrongUse(c, "unknown command %q", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	cli.VersionPrinter = func(c *cli.Context) { fmt.Fprintf(c.App.Writer, "daxfs %s\n", c.App.Version) }
	for _, r := range registered {
		c := r.make(e)
		prepare(c)
		app.Commands = append(app.Commands, c)
	}
	return app
}

// prepare sets the defaults of all commands.
func prepare(c *cli.Command) {
	c.OnUsageError = onUsageError
	c.HideHelpCommand = true
	if c.BashComplete == nil {
		c.BashComplete = suggest
	}
	// Descriptions are raw strings and shown unchanged.
	c.Description = strings.TrimSpace(c.Description)
	if len(c.Subcommands) > 0 {
		c.Action = func(c *cli.Context) error {
			if c.Args().Present() {
				return wrongUse(c, "unknown command %q", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		}
	}
	for _, s := range c.Subcommands {
		prepare(s)
	}
}

func wrongUse(c *cli.Context, format string, args ...any) error {
	return &usageError{command: commandName(c), msg: fmt.Sprintf(format, args...)}
}

// commandName returns the name of the running command, such as "convert" or "pool init"; "" for the program itself.
func commandName(c *cli.Context) string {
	if c.Command == nil {
		return ""
	}
	return strings.TrimSpace(strings.TrimPrefix(c.Command.HelpName, c.App.Name))
}

func onUsageError(c *cli.Context, err error, _ bool) error {
	msg := err.Error()
	// Package flag names an unknown flag with one dash, however it was written.
	if flag, ok := strings.CutPrefix(msg, "flag provided but not defined: -"); ok {
		msg = "unknown flag " + dashed(flag)
	}
	return wrongUse(c, "%s", msg)
}

// dashed returns the name of a flag as in help texts.
func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// needArgs checks the number of arguments. names are the expected arguments; "[X]" is optional.
func needArgs(c *cli.Context, names ...string) error {
	least := 0
	for _, n := range names {
		if !strings.HasPrefix(n, "[") {
			least++
		}
	}
	if n := c.NArg(); n < least || n > len(names) {
		return wrongUse(c, "%d arguments, expected %s", n, strings.Join(names, " "))
	}
	return nil
}

// reorder moves flags before arguments, so that "convert SOURCE -o IMAGE" works: Go's flag parser
// stops at the first argument. Everything after "--" stays in place.
func reorder(args []string, flags []cli.Flag, commands []*cli.Command) []string {
	if len(args) == 0 || args[len(args)-1] == completionFlag {
		return args
	}
	out := []string{args[0]}
	args = args[1:]
	// Flags before the command belong to the program. Then follow the command and perhaps a subcommand.
	for len(args) > 0 {
		if strings.HasPrefix(args[0], "-") {
			break
		}
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[0]) })
		if i < 0 {
			break
		}
		out = append(out, args[0])
		flags, commands = commands[i].Flags, commands[i].Subcommands
		args = args[1:]
	}
	var options, rest []string
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			rest = append(rest, args[i+1:]...)
			break
		}
		if len(a) < 2 || a[0] != '-' {
			rest = append(rest, a)
			continue
		}
		options = append(options, a)
		if takesValue(a, flags) {
			if i++; i == len(args) {
				// Let the parser report the missing value, instead of taking an argument for it.
				return append(out, options...)
			}
			options = append(options, args[i])
		}
	}
	out = append(out, options...)
	if len(rest) > 0 && slices.ContainsFunc(rest, func(a string) bool { return len(a) > 1 && a[0] == '-' }) {
		out = append(out, "--")
	}
	return append(out, rest...)
}

// takesValue reports whether the argument after an option belongs to it.
func takesValue(option string, flags []cli.Flag) bool {
	name := strings.TrimLeft(option, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			d, ok := f.(cli.DocGenerationFlag)
			return ok && d.TakesValue()
		}
	}
	return false
}
