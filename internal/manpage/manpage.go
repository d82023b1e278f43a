// Package manpage writes a manual page from the commands and flags of a urfave/cli program, so that
// the two cannot differ. Only tests use it: a test of each program compares its page in docs/man with
// the generated one, and with UPDATE_MAN=1 writes it anew.
package manpage

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// Page holds the parts of a page that the program's definitions lack.
type Page struct {
	// Section of the manual.
	Section int
	// Intro is the text of DESCRIPTION: paragraphs separated by empty lines.
	Intro string
	// Sections follow the commands.
	Sections []Section
}

// Section is a part of a page, with text like Intro. A paragraph "term<TAB>text" is an entry of a list.
type Section struct{ Title, Text string }

// Render returns the page of a program as roff for man(7).
func (p Page) Render(app *cli.App) []byte {
	var b builder
	b.macro("TH", strings.ToUpper(app.Name), fmt.Sprint(p.Section), "", "daxfs", "daxfs manual")
	b.macro("SH", "NAME")
	b.text(app.Name + " - " + app.Usage)
	b.macro("SH", "SYNOPSIS")
	if app.Action != nil {
		b.synopsis(app.Name, app.VisibleFlags(), "")
	}
	eachCommand(app.Name, app.Commands, func(name string, c *cli.Command) {
		if len(c.Subcommands) == 0 {
			b.synopsis(name, c.VisibleFlags(), c.ArgsUsage)
		}
	})
	b.macro("SH", "DESCRIPTION")
	b.paragraphs(p.Intro)
	if flags := app.VisibleFlags(); len(flags) > 0 {
		b.macro("SH", "OPTIONS")
		b.flags(flags)
	}
	b.macro("SH", "COMMANDS")
	eachCommand(app.Name, app.Commands, func(name string, c *cli.Command) {
		b.macro("SS", strings.TrimSpace(name+" "+arguments(c)))
		b.text(sentence(c.Usage))
		if len(c.Subcommands) > 0 {
			b.text("See its commands below.")
		}
		b.paragraphs(c.Description)
		b.flags(c.VisibleFlags())
	})
	for _, s := range p.Sections {
		b.macro("SH", s.Title)
		b.paragraphs(s.Text)
	}
	return []byte(b.String())
}

// eachCommand calls f for all visible commands, each before its subcommands.
func eachCommand(prefix string, commands []*cli.Command, f func(name string, c *cli.Command)) {
	for _, c := range commands {
		if c.Hidden || c.Name == "help" {
			continue
		}
		name := prefix + " " + c.Name
		f(name, c)
		eachCommand(name, c.Subcommands, f)
	}
}

func arguments(c *cli.Command) string { return strings.TrimSpace(c.ArgsUsage) }

// sentence turns a usage text into a sentence.
func sentence(s string) string {
	if s == "" {
		return ""
	}
	return strings.ToUpper(s[:1]) + strings.TrimSuffix(s[1:], ".") + "."
}

type builder struct{ strings.Builder }

// macro writes a request with its arguments.
func (b *builder) macro(name string, args ...string) {
	b.WriteString("." + name)
	for _, a := range args {
		b.WriteString(` "` + strings.ReplaceAll(escape(a), `"`, `\(dq`) + `"`)
	}
	b.WriteByte('\n')
}

// text writes lines of running text.
func (b *builder) text(s string) {
	for line := range strings.Lines(strings.TrimSpace(s)) {
		line = escape(strings.TrimSpace(line))
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			line = `\&` + line
		}
		b.WriteString(line + "\n")
	}
}

// paragraphs writes paragraphs separated by empty lines. Indented text is shown verbatim.
func (b *builder) paragraphs(s string) {
	s = strings.Trim(s, "\n")
	for _, p := range strings.Split(s, "\n\n") {
		term, rest, list := strings.Cut(p, "\t")
		switch {
		case strings.TrimSpace(p) == "":
		case list:
			b.macro("TP")
			b.WriteString(".B " + escape(strings.TrimSpace(term)) + "\n")
			b.text(rest)
		default:
			b.macro("PP")
			b.mixed(p)
		}
	}
}

// mixed writes a paragraph with some indented lines, such as examples.
func (b *builder) mixed(p string) {
	verbatim := false
	for line := range strings.Lines(p) {
		line = strings.TrimRight(line, "\n")
		indented := strings.HasPrefix(line, "  ")
		if indented != verbatim {
			if indented {
				b.WriteString(".PP\n.RS 3\n.nf\n")
			} else {
				b.WriteString(".fi\n.RE\n.PP\n")
			}
			verbatim = indented
		}
		b.text(line)
	}
	if verbatim {
		b.WriteString(".fi\n.RE\n")
	}
}

// synopsis writes one way to call the program.
func (b *builder) synopsis(name string, flags []cli.Flag, args string) {
	b.WriteString(".B " + escape(name) + "\n")
	if len(visible(flags)) > 0 {
		b.text("[OPTION]...")
	}
	if args != "" {
		b.text(args)
	}
	b.WriteString(".br\n")
}

// flags writes a list of options.
func (b *builder) flags(flags []cli.Flag) {
	for _, f := range visible(flags) {
		doc, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		usage, value := placeholder(doc.GetUsage())
		var names []string
		for _, n := range f.Names() {
			n = strings.Repeat("-", min(2, len(n))) + n
			if doc.TakesValue() {
				n += " " + value
			}
			names = append(names, n)
		}
		b.macro("TP")
		b.WriteString(".B " + escape(strings.Join(names, ", ")) + "\n")
		usage = sentence(usage)
		if def := strings.ReplaceAll(doc.GetValue(), `"`, ""); doc.TakesValue() && def != "" &&
			def != "0" && def != "[]" {
			usage += " Default: " + def + "."
		}
		b.text(usage)
	}
}

// visible leaves out the flags that every program has.
func visible(flags []cli.Flag) []cli.Flag {
	return slices.DeleteFunc(slices.Clone(flags), func(f cli.Flag) bool {
		return slices.Contains(f.Names(), "help") || slices.Contains(f.Names(), "generate-bash-completion")
	})
}

// placeholder splits the name of a flag's value, in backquotes, from its usage.
func placeholder(usage string) (text, value string) {
	parts := strings.SplitN(usage, "`", 3)
	if len(parts) < 3 {
		return usage, "VALUE"
	}
	return parts[0] + parts[1] + parts[2], parts[1]
}

// escape makes text safe for roff: backslashes, and hyphens, so that they can be copied.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
}

// TB is the part of testing.TB that Check needs.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
}

// Check compares a file with the generated page, or writes it if UPDATE_MAN=1 is in the environment.
func Check(t TB, file string, page []byte) {
	t.Helper()
	if os.Getenv("UPDATE_MAN") == "1" {
		if err := os.WriteFile(file, page, 0o644); err != nil {
			t.Errorf("%v", err)
		}
		return
	}
	have, err := os.ReadFile(file)
	if err != nil || string(have) != string(page) {
		t.Errorf("%s is not what the program's flags and commands say (%v): run \"make man\"", file, err)
	}
}
