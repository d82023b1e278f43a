package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

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
				return
			}
			suggest(c)
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
				_, err := io.WriteString(e.stdout, fishCompletion)
				return err
			default:
				return wrongUse(c, "shell %q, expected bash, zsh or fish", shell)
			}
		},
	}
}

// completionFlag asks for possible continuations. Scripts put "-" before it to ask for flags.
const completionFlag = "--generate-bash-completion"

// asksAfterDashes reports whether a script asks for continuations of "--". The library would take the
// question for arguments and run the command: a TAB would unmount a directory, or remove an image.
func asksAfterDashes(args []string) bool {
	return len(args) > 0 && args[len(args)-1] == completionFlag && slices.Contains(args, "--")
}

// suggest writes the possible continuations: commands or flags, each with its usage after a tab. If it
// writes nothing, the shell completes file names.
func suggest(c *cli.Context) {
	if n := c.NArg(); n > 0 {
		if c.Args().Get(n-1) == "-" {
			for _, f := range c.Command.VisibleFlags() {
				usage := ""
				if d, ok := f.(cli.DocGenerationFlag); ok {
					usage = strings.ReplaceAll(d.GetUsage(), "`", "")
				}
				for _, name := range f.Names() {
					fmt.Fprintf(c.App.Writer, "%s\t%s\n", dashed(name), usage)
				}
			}
		}
		return
	}
	for _, s := range c.Command.Subcommands {
		for _, name := range s.Names() {
			fmt.Fprintf(c.App.Writer, "%s\t%s\n", name, s.Usage)
		}
	}
}

// The scripts ask the program, unless the previous word is a flag: its value can only be completed as
// a file name, and so can the word after a flag without a value.
const bashCompletion = `_daxfs() {
  local cur=${COMP_WORDS[COMP_CWORD]} line
  local words=("${COMP_WORDS[@]:0:COMP_CWORD}") names=()
  COMPREPLY=()
  if [[ $cur == -* ]]; then
    words+=(-)
  elif [[ ${words[COMP_CWORD-1]} == -* ]]; then
    return
  fi
  while IFS= read -r line; do
    names+=("${line%%$'\t'*}")
  done < <("${words[@]}" --generate-bash-completion 2>/dev/null)
  mapfile -t COMPREPLY < <(compgen -W "${names[*]}" -- "$cur")
}
complete -o bashdefault -o default -F _daxfs daxfs
`

const zshCompletion = `#compdef daxfs
_daxfs() {
  local -a asked names
  asked=("${(@Q)words[1,CURRENT-1]}")
  if [[ $words[CURRENT] == -* ]]; then
    asked+=(-)
  fi
  if [[ $words[CURRENT] == -*=* ]]; then
    compset -P '*='
  elif [[ $words[CURRENT] == -* || $words[CURRENT-1] != -* ]]; then
    names=("${(@f)$("${asked[@]}" --generate-bash-completion 2>/dev/null)}")
  fi
  if [[ -n $names[1] ]]; then
    names=("${(@)names/$'\t'/:}")
    _describe daxfs names
  else
    compset -P '(oci|oci-archive|docker-archive|rootfs|daxfs):'
    _files
  fi
}
# In a file below $fpath this runs for the first completion, else when the script is sourced.
if [[ $funcstack[1] == _daxfs ]]; then
  _daxfs "$@"
else
  compdef _daxfs daxfs
fi
`

const fishCompletion = `function __daxfs_names
  set -l asked (commandline -opc)
  if string match -q -- '-*=*' (commandline -ct)
    return
  else if string match -q -- '-*' (commandline -ct)
    set -a asked -
  else if string match -q -- '-*' $asked[-1]
    return
  end
  $asked --generate-bash-completion 2>/dev/null
end
complete -c daxfs -f -n 'count (__daxfs_names) >/dev/null' -a '(__daxfs_names)'
`
