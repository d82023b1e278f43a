package main

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// poolImage is an image in the output of pool ls, pool show and pool put with --json.
type poolImage struct {
	pool.Image
	UUID    string   `json:"uuid"`
	Names   []string `json:"names,omitempty"`
	Holders []string `json:"holders,omitempty"`
	// Brought is the number of bytes that the pool stored newly for the image; 0 if unknown.
	Brought int64            `json:"brought,omitempty"`
	Usage   *pool.ImageUsage `json:"usage,omitempty"`
}

// poolState is the output of pool ls --json and pool show --json.
type poolState struct {
	ID         string      `json:"id"`
	Epoch      string      `json:"epoch"`
	Generation uint64      `json:"generation"`
	Size       int64       `json:"size"`
	Slots      int         `json:"slots"`
	SlotsUsed  int         `json:"slotsUsed"`
	Windows    bool        `json:"windows"`
	DAX        bool        `json:"dax"`
	Unshared   int64       `json:"unshared"` // the size of the images' contents without sharing
	Contents   int64       `json:"contents"` // and with sharing
	Saved      int64       `json:"saved"`
	Index      *poolHolds  `json:"index,omitempty"` // the data that the pool itself lacks
	Images     []poolImage `json:"images"`
	// Readers are the readers with lease regions.
	Readers []store.LeaseUser `json:"readers,omitempty"`
}

// poolHolds is data from the index of a pool, in bytes.
type poolHolds struct {
	Layers   int   `json:"layers"`
	Extents  int64 `json:"extents"` // contents that images and layers hold
	Files    int   `json:"files"`
	Metadata int64 `json:"metadata"`
	Waiting  int64 `json:"waiting"` // contents that nothing holds but that may still be read
	Free     int64 `json:"free"`
}

// state reads the pool's own data without a lock and without writing, as any process on any machine
// may at any time. Data of the index comes from the daemon that has it open, or else from the file.
func (e *env) state(c *cli.Context, a poolArgs) (*poolState, error) {
	r, cat, err := a.open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	s := &poolState{
		ID: hex.EncodeToString(cat.PoolID[:]), Epoch: uuid(cat.Geometry.UUID),
		Generation: cat.Generation, Size: cat.Size,
		Slots: cat.Geometry.Slots, SlotsUsed: cat.SlotsUsed, Windows: cat.Windows, DAX: cat.DAX, Images: []poolImage{},
	}
	shared, err := pool.ReadShared(r, cat)
	if err != nil {
		fmt.Fprintf(e.stderr, "daxfs: what some images share is not known: %s\n", message(err))
	}
	for _, m := range cat.Images {
		im := poolImage{Image: m, UUID: uuid(m.UUID)}
		if shared != nil {
			if u, ok := shared.Images[m.Key]; ok {
				im.Usage = &u
			}
		}
		s.Images = append(s.Images, im)
	}
	if shared != nil {
		s.Unshared, s.Contents, s.Saved = shared.Unshared, shared.ImageExtents, shared.Unshared-shared.ImageExtents
	}
	if err := e.addIndex(c, s, a, cat); err != nil {
		what := "names, layers and free space are not known"
		if s.Index != nil {
			what = "not all readers are known"
		}
		fmt.Fprintf(e.stderr, "daxfs: %s: %s\n", what, message(err))
	}
	return s, nil
}

func (e *env) addIndex(c *cli.Context, s *poolState, a poolArgs, cat *pool.Catalogue) error {
	if d := dialControl(c.String("control")); d.owns(c.Context, s.ID) {
		list, err := d.Images(c.Context)
		if err != nil {
			return err
		}
		u, err := d.Usage(c.Context)
		if err != nil {
			return err
		}
		s.Index = &poolHolds{
			u.Layers, u.Extents, u.ExtentCount, u.Tree + u.Segments + u.Documents, u.Dead,
			u.Free + u.MetaFree,
		}
		for _, info := range list {
			s.name(info)
		}
		s.Readers, err = d.Readers(c.Context)
		return err
	}
	rc, err := a.region(true)
	if err != nil {
		return err
	}
	index := a.findIndex(rc, cat)
	if index == "" {
		if pid := ownerOf(rc); pid != 0 {
			return &region.BusyError{Path: rc.Path, PID: pid}
		}
		return errNoIndex
	}
	peeked, err := pool.ReadIndex(index, cat.Size)
	if err != nil {
		return err
	}
	if peeked.ID != cat.PoolID {
		return fmt.Errorf("index %q is that of pool %x, expected %x", index, peeked.ID, cat.PoolID)
	}
	free := cat.Size - cat.Geometry.TreeStart() - peeked.Metadata - peeked.Extents - peeked.Dead
	s.Index = &poolHolds{peeked.Layers, peeked.Extents, peeked.ExtentCount, peeked.Metadata, peeked.Dead, free}
	for key, raw := range peeked.Records["image"] {
		var info store.Info
		if err := json.Unmarshal(raw, &info); err != nil {
			return fmt.Errorf("record of image %q: %w", key, err)
		}
		info.Key = key
		s.name(info)
	}
	s.Readers, err = store.PeekReaders(peeked)
	return err
}

// name adds the index's data about an image.
func (s *poolState) name(info store.Info) {
	for i := range s.Images {
		if s.Images[i].Key == info.Key {
			s.Images[i].Names, s.Images[i].Holders, s.Images[i].Brought = info.Names, info.Holders, info.Brought
		}
	}
}

func (s *poolState) find(name string) (poolImage, error) {
	infos := make([]store.Info, len(s.Images))
	for i, m := range s.Images {
		infos[i] = store.Info{Image: m.Image, Names: m.Names, Holders: m.Holders}
	}
	found, err := store.Match(infos, name)
	if err != nil {
		return poolImage{}, err
	}
	i := slices.IndexFunc(s.Images, func(m poolImage) bool { return m.Key == found.Key })
	return s.Images[i], nil
}

// pinPrefix begins the holders that pool put makes; the name follows it.
const pinPrefix = "pin/"

// label returns an image's name in lists: its pins and names, or else its key.
func (m poolImage) label() string {
	var names []string
	for _, h := range m.Holders {
		if name, ok := strings.CutPrefix(h, pinPrefix); ok && name != m.Key {
			names = append(names, printable(name))
		}
	}
	for _, n := range m.Names {
		if !slices.Contains(names, printable(n)) {
			names = append(names, printable(n))
		}
	}
	if len(names) == 0 {
		return "-"
	}
	return strings.Join(names, ", ")
}

// shortKey returns the beginning of a key, which commands accept as well.
func shortKey(key string) string {
	const most = len("image/") + 12
	if strings.HasPrefix(key, "image/") && len(key) > most {
		key = key[len("image/"):most]
	}
	return printable(key)
}

func (e *env) poolList(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	s, err := e.state(c, poolArgsOf(c))
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tSLOT\tCONTENTS\tSHARED\tADDED\tNAMES")
	for _, m := range s.Images {
		contents, shared := "-", "-"
		if m.Usage != nil {
			contents, shared = human(m.Usage.Extents), human(m.Usage.Shared)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", shortKey(m.Key), m.Name(), contents, shared,
			m.Created.Local().Format(time.DateTime), m.label())
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return s.showReaders(e.stdout)
}

// showReaders lists the images in use by other kernels, including removed ones that wait for them.
func (s *poolState) showReaders(out io.Writer) error {
	if len(s.Readers) == 0 {
		return nil
	}
	listed := map[string]bool{}
	for _, m := range s.Images {
		listed[m.Key] = true
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\nREADER\tREGION\tIMAGE\tSTATE")
	line := func(u store.LeaseUser, key, state string) {
		if !listed[key] {
			state = strings.TrimPrefix(state+", removed", ", ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", printable(u.Reader), printable(u.Region), shortKey(key), state)
	}
	for _, u := range s.Readers {
		for _, key := range u.Images {
			line(u, key, "")
		}
		for _, key := range u.Earlier {
			line(u, key, "before its last boot")
		}
		if u.Torn > 0 {
			fmt.Fprintf(w, "%s\t%s\tall\t%d entries cannot be read\n", printable(u.Reader), printable(u.Region), u.Torn)
		}
	}
	return w.Flush()
}

func (e *env) poolShow(c *cli.Context) error {
	if err := needArgs(c, "POOL", "[IMAGE]"); err != nil {
		return err
	}
	s, err := e.state(c, poolArgsOf(c))
	if err != nil {
		return err
	}
	if name := c.Args().Get(1); name != "" {
		m, err := s.find(name)
		if err != nil {
			return fmt.Errorf("%s: %w", c.Args().First(), err)
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, m)
		}
		return m.show(e.stdout)
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	return s.show(e.stdout)
}

func (s *poolState) show(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "Pool\t%s, generation %d\n", s.ID, s.Generation)
	fmt.Fprintf(w, "Epoch\t%s, %d of %d slots used\n", s.Epoch, s.SlotsUsed, s.Slots)
	fmt.Fprintf(w, "Size\t%s\n", human(s.Size))
	fmt.Fprintf(w, "Images\t%d%s\n", len(s.Images), map[bool]string{true: ", with windows for daxfs.ko"}[s.Windows])
	if u := s.Index; u != nil {
		fmt.Fprintf(w, "Contents\t%s in %d distinct files\n", human(u.Extents), u.Files)
		fmt.Fprintf(w, "Metadata\t%s\n", human(u.Metadata))
		fmt.Fprintf(w, "Waiting\t%s that nothing holds, until nobody can read them\n", human(u.Waiting))
		fmt.Fprintf(w, "Free\t%s\n", human(u.Free))
		fmt.Fprintf(w, "Layers\t%d\n", u.Layers)
	}
	fmt.Fprintf(w, "Saved\t%s: the images' contents would take %s apart, and take %s\n",
		human(s.Saved), human(s.Unshared), human(s.Contents))
	return w.Flush()
}

func (m poolImage) show(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	added := m.Created.Local().Format(time.DateTime)
	fmt.Fprintf(w, "Image\t%s\nUUID\t%s\nAdded\t%s\nSlot\t%s\n", printable(m.Key), m.UUID, added, m.Name())
	if m.WindowSize > 0 {
		fmt.Fprintf(w, "Window\t%d bytes at %d (%#x)\n", m.WindowSize, m.Window, m.Window)
	}
	for _, n := range m.Names {
		fmt.Fprintf(w, "Name\t%s\n", printable(n))
	}
	for _, h := range m.Holders {
		fmt.Fprintf(w, "Held by\t%s\n", printable(h))
	}
	if u := m.Usage; u != nil {
		fmt.Fprintf(w, "Contents\t%s in %d distinct files\n", human(u.Extents), u.Files)
		fmt.Fprintf(w, "Shared\t%s with other images, %s of its own\n", human(u.Shared), human(u.Extents-u.Shared))
	}
	return w.Flush()
}
