// Command daxfs-snapshotter is the daemon that serves containerd: a proxy snapshotter and its differ on one socket.
//
// Its configuration is a TOML file (see package config and docs/config.md); flags override the file.
// Stopping the daemon, in any way, leaves containers and mounts alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"github.com/containerd/log"
	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon"
	"github.com/daxfs/daxfs-snapshotter/internal/version"
)

func main() {
	os.Exit(run(context.Background(), os.Args, os.Stdout, os.Stderr))
}

// run runs the program. It returns 0 for success, 1 for an error, and 2 for wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	err := app(stdout, stderr).RunContext(ctx, args)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "daxfs-snapshotter: %v\n", err)
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

// errUsage marks errors in the command line.
var errUsage = errors.New("see daxfs-snapshotter --help")

func usage(format string, args ...any) error {
	return fmt.Errorf("%w; %w", fmt.Errorf(format, args...), errUsage)
}

func app(stdout, stderr io.Writer) *cli.App {
	cli.VersionPrinter = func(c *cli.Context) { fmt.Fprintf(c.App.Writer, "daxfs-snapshotter %s\n", version.String()) }
	a := cli.NewApp()
	a.Name = "daxfs-snapshotter"
	a.Usage = "containerd snapshotter whose containers share one image in memory"
	a.Version = version.String()
	a.Writer, a.ErrWriter = stdout, stderr
	a.HideHelpCommand = true
	a.ExitErrHandler = func(*cli.Context, error) {} // run reports
	a.OnUsageError = func(_ *cli.Context, err error, _ bool) error { return usage("%w", err) }
	a.Flags = flags()
	a.Action = serve
	a.Commands = []*cli.Command{{
		Name:  "config",
		Usage: "show configurations",
		Action: func(c *cli.Context) error {
			return usage("expected \"config default\" or \"config check\"")
		},
		Subcommands: []*cli.Command{
			{
				Name: "default", Usage: "print the default configuration with explanations", Action: printDefault,
				OnUsageError: a.OnUsageError,
			},
			{
				Name: "check", Usage: "read the configuration that the flags name, and say what is wrong with it",
				Action: check, OnUsageError: a.OnUsageError,
			},
		},
	}}
	return a
}

// The flags. A flag without a default does not change the value of the file.
const (
	flagConfig     = "config"
	flagRoot       = "root"
	flagAddress    = "address"
	flagContainerd = "containerd-address"
	flagDriver     = "driver"
	flagLogLevel   = "log-level"
	flagLogFormat  = "log-format"
	flagMetrics    = "metrics-address"
)

func flags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name: flagConfig, Aliases: []string{"c"}, Value: config.DefaultPath,
			Usage: "configuration `FILE`",
		},
		&cli.StringFlag{Name: flagRoot, Usage: "state directory `DIR` (root)"},
		&cli.StringFlag{Name: flagAddress, Aliases: []string{"a"}, Usage: "unix `SOCKET` to serve on (address)"},
		&cli.StringFlag{Name: flagContainerd, Usage: "containerd's `SOCKET` (containerd.address)"},
		&cli.StringFlag{Name: flagDriver, Usage: "mount `DRIVER` (mount.driver)"},
		&cli.StringFlag{Name: flagLogLevel, Aliases: []string{"l"}, Usage: "log `LEVEL` (log.level)"},
		&cli.StringFlag{Name: flagLogFormat, Usage: "log `FORMAT` (log.format)"},
		&cli.StringFlag{Name: flagMetrics, Usage: "`ADDRESS` for metrics and health (metrics.address)"},
	}
}

// load reads the configuration and applies the flags.
func load(c *cli.Context) (*config.Config, error) {
	if c.Args().Present() {
		return nil, usage("unexpected argument %q", c.Args().First())
	}
	cfg, err := config.Load(c.String(flagConfig))
	if err != nil {
		return nil, err
	}
	for name, field := range map[string]*string{
		flagRoot: &cfg.Root, flagAddress: &cfg.Address, flagContainerd: &cfg.Containerd.Address,
		flagDriver:   &cfg.Mount.Driver,
		flagLogLevel: &cfg.Log.Level, flagLogFormat: &cfg.Log.Format, flagMetrics: &cfg.Metrics.Address,
	} {
		if c.IsSet(name) {
			*field = c.String(name)
		}
	}
	return cfg, cfg.Validate()
}

func printDefault(c *cli.Context) error {
	_, err := c.App.Writer.Write(config.Sample)
	return err
}

func check(c *cli.Context) error {
	if _, err := load(c); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.App.Writer, "ok")
	return err
}

func serve(c *cli.Context) error {
	cfg, err := load(c)
	if err != nil {
		return err
	}
	if err := log.SetLevel(cfg.Log.Level); err != nil {
		return err
	}
	if err := log.SetFormat(log.OutputFormat(cfg.Log.Format)); err != nil {
		return err
	}
	ctx := c.Context
	log.G(ctx).WithField("version", version.String()).WithField("root", cfg.Root).Info("starting daxfs-snapshotter")
	s, err := daemon.Open(ctx, cfg)
	if err != nil {
		return err
	}
	err = s.Serve(ctx, func() { notify(ctx, systemd.SdNotifyReady) })
	notify(ctx, systemd.SdNotifyStopping)
	return errors.Join(err, s.Close())
}

// notify reports a state to systemd, if systemd started the daemon.
func notify(ctx context.Context, state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warnf("cannot tell systemd %q", strings.TrimSpace(state))
	}
}
