package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"
)

func init() { register(900, completionCommand) }

func completionCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "write a script that completes daxfs commands in a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: `
Examples:
   source <(daxfs completion bash)
   daxfs completion zsh > ~/.zfunc/_daxfs
   daxfs completion fish > ~/.config/fish/completions/daxfs.fish`,
		BashComplete: func(c *cli.Context) {
			if c.NArg() == 0 {
				fmt.Fprintln(c.App.Writer, "bash\nzsh\nfish")
			}
		},
		Action: func(c *cli.Context) error {
			if err := needArgs(c, "bash|zsh|fish"); err != nil {
				return err
			}
			switch shell := c.Args().First(); shell {
			case "bash":
				_, err := io.WriteString(e.stdout, bashCompletion)
				return err
			case "zsh":
				_, err := io.WriteString(e.stdout, zshCompletion)
				return err
			case "fish":
				script, err := c.App.ToFishCompletion()
				if err != nil {
					return err
				}
				_, err = io.WriteString(e.stdout, script)
				return err
			default:
				return wrongUse(c, "shell %q, expected bash, zsh or fish", shell)
			}
		},
	}
}

// The program itself answers what can follow; where it has no answer the shell completes file names.
const bashCompletion = `_daxfs() {
  local cur=${COMP_WORDS[COMP_CWORD]}
  local words=("${COMP_WORDS[@]:0:COMP_CWORD}")
  [[ $cur == -* ]] && words+=("$cur")
  mapfile -t COMPREPLY < <(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$cur")
}
complete -o bashdefault -o default -F _daxfs daxfs
`

const zshCompletion = `#compdef daxfs
_daxfs() {
  local -a opts
  local cur=${words[CURRENT]}
  if [[ $cur == -* ]]; then
    opts=("${(@f)$(${words[@]:0:$((CURRENT-1))} $cur --generate-bash-completion 2>/dev/null)}")
  else
    opts=("${(@f)$(${words[@]:0:$((CURRENT-1))} --generate-bash-completion 2>/dev/null)}")
  fi
  if [[ -n ${opts[1]} ]]; then
    _describe values opts
  else
    _files
  fi
}
compdef _daxfs daxfs
`
