package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// rootHash returns the value of --root-hash, or nil if it is not set.
func rootHash(c *cli.Context) (*daxfs.RootHash, error) {
	if !c.IsSet("root-hash") {
		return nil, nil
	}
	var h daxfs.RootHash
	text := c.String("root-hash")
	if b, err := hex.DecodeString(text); err != nil || len(b) != len(h) {
		return nil,
			wrongUse(c, "--root-hash %q: %d characters, expected %d hexadecimal digits", text, len(text), 2*len(h))
	}
	_, err := hex.Decode(h[:], []byte(text))
	return &h, err
}

// withoutFinding drops an error that is a finding, because it was reported.
func withoutFinding(err error) error {
	if _, ok := errors.AsType[*daxfs.FormatError](err); ok {
		return nil
	}
	return err
}

// proof is the part of verify that goes beyond the check.
type proof struct {
	root     *daxfs.RootHash
	src      source.Source // nil if there is nothing to compare with
	platform source.Platform
}

// proofOf reads the flags of verify. The caller closes the proof.
func (e *env) proofOf(c *cli.Context) (p proof, err error) {
	if p.root, err = rootHash(c); err == nil && c.IsSet("source") {
		p.src, p.platform, err = e.parseSource(c, c.String("source"), converter.DefaultMaxSize, func(m string) {
			fmt.Fprintln(e.stderr, message(errors.New(m)))
		})
	}
	return p, err
}

func (p *proof) close() {
	if p.src != nil {
		p.src.Close()
	}
}

// run compares an image with its digests, and its tree with the source. An error means it could not do so.
func (p *proof) run(c *cli.Context, stderr io.Writer, img *image, report func(daxfs.Finding) bool) error {
	err := daxfs.Prove(c.Context, img, img.size, daxfs.ProveOptions{Root: p.root}, report)
	if errors.Is(err, daxfs.ErrNoDigests) {
		err = nil
		if p.src == nil {
			fmt.Fprintf(stderr, "daxfs: %s: it has no digest table: its contents are not proven\n",
				printable(img.Name()))
		}
	}
	if err = withoutFinding(err); err != nil || p.src == nil {
		return err
	}
	f, err := img.fs()
	if err != nil {
		return withoutFinding(err) // the check has reported it
	}
	return converter.Compare(c.Context, p.src, f, converter.Options{Platform: p.platform}, report)
}
