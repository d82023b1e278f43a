package main

import (
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/internal/version"
)

func init() { register(920, versionCommand) }

// askHelp turns "daxfs help COMMAND" into "daxfs COMMAND --help". The library's own help command
// handles subcommands differently and drops the flag.
func askHelp(args []string, commands []*cli.Command) []string {
	if len(args) < 2 || args[1] != "help" {
		return args
	}
	args = append([]string{args[0]}, args[2:]...)
	for _, name := range args[1:] {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(name) })
		if i < 0 {
			return args // wrong usage, reported later
		}
		commands = commands[i].Subcommands
	}
	return append(args, "--help")
}

func versionCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "show the version, as --version does",
		Description: `
Example:
   daxfs version`,
		Action: func(c *cli.Context) error {
			if err := needArgs(c); err != nil {
				return err
			}
			_, err := fmt.Fprintf(e.stdout, "daxfs %s\n", version.String())
			return err
		},
	}
}
