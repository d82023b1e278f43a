package manpage

import (
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestRender(t *testing.T) {
	app := &cli.App{
		Name: "prog", Usage: "do things",
		Flags: []cli.Flag{&cli.StringFlag{
			Name: "config", Aliases: []string{"c"}, Value: "/etc/x",
			Usage: "configuration `FILE`",
		}},
		Commands: []*cli.Command{
			{
				Name: "see", Usage: "show things", ArgsUsage: "THING...",
				Description: "First.\n.dot and \\ back-slash\n\nExamples:\n   prog see -a\n   prog see b",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "json", Usage: "write JSON"},
					&cli.IntFlag{Name: "n", Usage: "count"},
				},
			},
			{Name: "secret", Hidden: true},
			{Name: "group", Usage: "many", Subcommands: []*cli.Command{{Name: "one", Usage: "the one"}}},
		},
	}
	got := string(Page{Section: 1, Intro: "Intro.", Sections: []Section{{"FILES", "/etc/x\tthe file"}}}.Render(app))
	for _, want := range []string{
		".TH \"PROG\" \"1\"", "prog \\- do things\n", ".B prog see\n[OPTION]...\nTHING...\n", ".B prog group one\n",
		".SS \"prog see THING...\"\nShow things.\n", "\\&.dot and \\e back\\-slash\n",
		".nf\nprog see \\-a\nprog see b\n.fi\n",
		".B \\-\\-config FILE, \\-c FILE\nConfiguration FILE. Default: /etc/x.\n", ".B \\-\\-json\nWrite JSON.\n",
		".B \\-n VALUE\nCount.\n",
		".SH \"FILES\"\n.TP\n.B /etc/x\nthe file\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "secret") {
		t.Error("a hidden command is shown")
	}
}
