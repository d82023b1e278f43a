package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

func init() { register(30, verifyCommand) }

func verifyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "prove that an image is sound, and that its contents are what was written",
		ArgsUsage: "IMAGE",
		Description: `
IMAGE is a file of exactly the image's size, or a block device, which may be larger. Writes every
finding with the rule that it breaks (docs/format.md explains the rules), and ends with status 3 if
there are any; status 1 means that the image could not be read. For a sound image it writes nothing.

verify checks both halves, and compares all bytes with the digests in the image. This finds
accidental changes. An image without digests, as earlier versions wrote it, is only checked, with a
message that says so. --root-hash proves that this is the very image whose hash inspect showed when
it was in good hands. --source reads an OCI image again (convert lists the forms of SOURCE) and
proves that the image shows exactly its files.

Examples:
   daxfs verify debian.daxfs && mount -t erofs -o ro debian.daxfs /mnt
   daxfs verify --json debian.daxfs | jq -r .rule | sort | uniq -c
   daxfs verify --root-hash "$(cat debian.hash)" debian.daxfs
   daxfs verify --source docker://debian:12 debian.daxfs`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "write findings as lines of JSON"},
			&cli.StringFlag{Name: "root-hash", Usage: "the image must have `HASH`, 64 hexadecimal digits"},
			&cli.StringFlag{Name: "source", Usage: "the image must show the files of `SOURCE`"},
		}, sourceFlags()...),
		Action: e.verify,
	}
}

// finding is a line of verify --json. Off is -1 for a finding without a place.
type finding struct {
	Rule string `json:"rule"`
	Off  int64  `json:"offset"`
	Ino  uint64 `json:"inode"`
	Path string `json:"path"`
	Name []byte `json:"pathBytes,omitempty"`
	Msg  string `json:"message"`
}

func (e *env) verify(c *cli.Context) error {
	if err := needArgs(c, "IMAGE"); err != nil {
		return err
	}
	p, err := e.proofOf(c)
	if err != nil {
		return err
	}
	defer p.close()
	img, err := openImage(c.Args().First())
	if err != nil {
		return err
	}
	defer img.Close()
	found := 0
	var writeErr error
	report := func(f daxfs.Finding) bool {
		found++
		if c.Bool("json") {
			writeErr = writeJSONLine(e.stdout, finding{string(f.Rule), f.Off, f.Ino, f.Path, bytesOf(f.Path), f.Msg})
		} else {
			_, writeErr = fmt.Fprintln(e.stdout, f)
		}
		return writeErr == nil && c.Context.Err() == nil
	}
	err = daxfs.Check(img, img.size, report)
	if err = withoutFinding(err); err == nil && writeErr == nil {
		err = p.run(c, e.stderr, img, report)
	}
	switch {
	case c.Context.Err() != nil:
		return c.Context.Err()
	case writeErr != nil:
		return writeErr
	case err != nil:
		return fmt.Errorf("%s: %w", img.Name(), err)
	case found > 0:
		fmt.Fprintf(e.stderr, "daxfs: %s: %d findings\n", printable(img.Name()), found)
		return errFindings
	}
	return nil
}
