package daemon

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

const ofdLock = "an OFD lock"

// across tests effects between places: locks and watches on a file of the image, or on a copied-up one.
type across struct {
	*scene
	t        *testing.T
	file     string // below the roots
	copiedUp bool
	notes    acting
}

// openAt opens the file in a place, for writing if it is the container's own.
func (x *across) openAt(place string) *os.File {
	x.t.Helper()
	flags := os.O_RDONLY
	if x.copiedUp && !isView(place) {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(x.dir(place, x.file), flags, 0)
	if err != nil {
		x.t.Fatal(err)
	}
	return f
}

// each makes holder take something and checks that it blocks holder's own place, and no other.
func (x *across) each(what string, have func(f *os.File) error, blocked func(f *os.File) error) {
	for _, holder := range places {
		h := x.openAt(holder)
		shared := what == ofdLock && (!x.copiedUp || isView(holder)) // two locks for reading
		err := have(h)
		x.notes.note(holder+" takes "+what, err)
		for _, p := range places {
			f := x.openAt(p)
			err := blocked(f)
			x.notes.note(p+" wants it too", err)
			if p != holder && err != nil {
				x.t.Errorf("%s: %s of %s is in the way of %s: %v", x.name, what, holder, p, err)
			}
			if p == holder && err == nil && !shared {
				x.t.Errorf("%s: %s of %s is in nobody's way", x.name, what, holder)
			}
			if err := f.Close(); err != nil {
				x.t.Error(err)
			}
		}
		if err := h.Close(); err != nil {
			x.t.Error(err)
		}
	}
}

func flock(how int) func(*os.File) error {
	return func(f *os.File) error { return unix.Flock(int(f.Fd()), how|unix.LOCK_NB) }
}

// record sets a POSIX or OFD lock, for writing if the file is open for writing.
func (x *across) record(cmd int) func(*os.File) error {
	return func(f *os.File) error {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 5, Len: 10}
		if flags&unix.O_ACCMODE == unix.O_RDWR {
			lock.Type = unix.F_WRLCK
		}
		return unix.FcntlFlock(f.Fd(), cmd, &lock)
	}
}

// conflict fails like a lock request of another process: a process's own POSIX locks never conflict.
func conflict(f *os.File) error {
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return err
	}
	if lock.Type != unix.F_UNLCK {
		return unix.EAGAIN
	}
	return nil
}

func (x *across) locks() {
	x.each("an exclusive flock", flock(unix.LOCK_EX), flock(unix.LOCK_EX))
	x.each("a shared flock", flock(unix.LOCK_SH), flock(unix.LOCK_EX))
	x.each(ofdLock, x.record(unix.F_OFD_SETLK), x.record(unix.F_OFD_SETLK))
	x.each("an OFD lock, seen by others", x.record(unix.F_OFD_SETLK), conflict)
	x.posix()
	x.leases()
}

// posix is each for POSIX locks: a process loses them when it closes any descriptor of the file.
func (x *across) posix() {
	for _, holder := range places {
		h := x.openAt(holder)
		x.notes.note(holder+" takes a POSIX lock", x.record(unix.F_SETLK)(h))
		for _, p := range places {
			f := x.openAt(p)
			err := conflict(f)
			x.notes.note(p+" wants it too", err)
			if p != holder && err != nil {
				x.t.Errorf("%s: a POSIX lock of %s is in the way of %s", x.name, holder, p)
			}
			if err := f.Close(); err != nil {
				x.t.Error(err)
			}
			x.notes.note("again", x.record(unix.F_SETLK)(h))
		}
		if err := h.Close(); err != nil {
			x.t.Error(err)
		}
	}
}

// leases takes a lease in one place and opens the file in all.
func (x *across) leases() {
	for _, holder := range places {
		h, err := os.Open(x.dir(holder, x.file))
		if err != nil {
			x.t.Fatal(err)
		}
		_, err = unix.FcntlInt(h.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		x.notes.note(holder+" takes a lease", err)
		for _, p := range places {
			fd, err := unix.Open(x.dir(p, x.file), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			x.notes.note(p+" opens", err)
			if p != holder && err != nil {
				x.t.Errorf("%s: a lease of %s is in the way of %s: %v", x.name, holder, p, err)
			}
			if err == nil {
				unix.Close(fd)
			}
		}
		_, err = unix.FcntlInt(h.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
		x.notes.note("lease ends", errors.Join(err, h.Close()))
	}
}

// touch triggers watch events in a place. It changes nothing in a view.
func (x *across) touch(place string) {
	f := x.openAt(place)
	_, err := f.Read(make([]byte, 10))
	x.notes.note("read", err)
	if !isView(place) && x.copiedUp {
		_, err := f.WriteString("changed")
		x.notes.note("write", err)
	}
	if err := f.Close(); err != nil {
		x.t.Error(err)
	}
}

// watch triggers events in all places, and expects those of holder only.
func (x *across) watch(what, holder string, events func() (string, error)) {
	for _, p := range places {
		x.touch(p)
		seen, err := events()
		x.notes.note(what+" in "+holder+" of "+p, err, seen)
		if p != holder && seen != "" {
			x.t.Errorf("%s: %s in %s shows what is done in %s: %s", x.name, what, holder, p, seen)
		}
		if p == holder && seen == "" {
			x.t.Errorf("%s: %s in %s shows nothing", x.name, what, holder)
		}
	}
}

func (x *across) inotify() {
	for _, holder := range places {
		for _, name := range []string{x.file, x.file[:strings.LastIndexByte(x.file, '/')]} {
			fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
			if err != nil {
				x.t.Fatal(err)
			}
			_, err = unix.InotifyAddWatch(fd, x.dir(holder, name), unix.IN_ALL_EVENTS)
			x.notes.note("watch "+name, err)
			x.watch("inotify on "+name, holder, func() (string, error) {
				return events(fd, func(b []byte) (string, int) {
					n := binary.NativeEndian.Uint32(b[12:])
					return maskText(uint64(binary.NativeEndian.Uint32(b[4:]))), unix.SizeofInotifyEvent + int(n)
				})
			})
			unix.Close(fd)
		}
	}
}

func (x *across) fanotify() {
	const mask = unix.FAN_OPEN | unix.FAN_ACCESS | unix.FAN_MODIFY | unix.FAN_CLOSE
	for _, mark := range []uint{0, unix.FAN_MARK_MOUNT, unix.FAN_MARK_FILESYSTEM} {
		for _, holder := range places {
			const class = unix.FAN_CLASS_NOTIF | unix.FAN_NONBLOCK | unix.FAN_CLOEXEC
			fd, err := unix.FanotifyInit(class, unix.O_RDONLY|unix.O_CLOEXEC)
			if err != nil {
				x.t.Fatal("fanotify: ", err)
			}
			err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD|mark, mask, unix.AT_FDCWD, x.dir(holder, x.file))
			x.notes.note("mark", err)
			x.watch("fanotify", holder, func() (string, error) {
				return events(fd, func(b []byte) (string, int) {
					e := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
					unix.Close(int(e.Fd))
					return maskText(e.Mask), int(e.Event_len)
				})
			})
			unix.Close(fd)
		}
	}
}

// events reads all pending events; one returns an event as text, and its length.
func events(fd int, one func([]byte) (string, int)) (string, error) {
	b := make([]byte, 64<<10)
	n, err := unix.Read(fd, b)
	if err == unix.EAGAIN {
		return "", nil
	}
	var all []string
	for b = b[:max(n, 0)]; len(b) > 0; {
		text, size := one(b)
		all, b = append(all, text), b[size:]
	}
	return strings.Join(all, " "), err
}

func maskText(mask uint64) string {
	names := map[uint64]string{
		unix.IN_OPEN: "open", unix.IN_ACCESS: "access", unix.IN_MODIFY: "modify", unix.IN_CLOSE_WRITE: "close",
		unix.IN_CLOSE_NOWRITE: "close", unix.IN_ATTRIB: "attrib", unix.IN_ISDIR: "dir",
	}
	var b strings.Builder
	for bit := uint64(1); bit != 0; bit <<= 1 {
		if mask&bit != 0 {
			b.WriteString("+" + names[bit])
		}
	}
	return b.String()
}

// TestApartLocks takes locks and sets watches in each place on files shared by all places.
func TestApartLocks(t *testing.T) {
	slow.Skip(t, "compares every lock in every place")
	for _, f := range fewFlavours(3) {
		t.Run(f.name, func(t *testing.T) {
			stages := []string{"lower", "upper"}
			ours, plain := twoScenes(t, f, stages)
			for _, test := range []struct {
				name string
				do   func(*across)
			}{{"locks", (*across).locks}, {"inotify", (*across).inotify}, {"fanotify", (*across).fanotify}} {
				for _, stage := range stages {
					t.Run(test.name+"/"+stage, func(t *testing.T) {
						for _, name := range []string{"x", "h1", "empty1"} {
							notes := map[*scene][]string{}
							for _, s := range []*scene{plain, ours} {
								x := &across{scene: s, t: t, file: stage + "/" + name, copiedUp: stage == "upper"}
								test.do(x)
								notes[s] = x.notes.notes
							}
							same(t, name, notes[plain], notes[ours])
						}
					})
				}
			}
		})
	}
}
