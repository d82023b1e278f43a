package sink

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// spill is an unnamed file beside the image, for waiting contents without room in memory.
type spill struct {
	f   *os.File
	end int64
}

// open creates the file in dir, because the directory for temporary files may be in memory.
func (s *spill) open(dir string) error {
	if s.f != nil {
		return nil
	}
	f, err := os.CreateTemp(dir, ".daxfs-spill-*")
	if err != nil {
		return err
	}
	os.Remove(f.Name())
	s.f = f
	return nil
}

func (s *spill) close() {
	if s.f != nil {
		s.f.Close()
		s.f = nil
	}
}

// spillPack moves the contents of p, a pack of l, to the spill file. Sink.mu must be held; it is
// released during the write.
func (s *Sink) spillPack(l *Layer, p *pack) error {
	if err := s.spill.open(filepath.Dir(s.f.Name())); err != nil {
		return fmt.Errorf("spill file: %w", err)
	}
	f, off := s.spill.f, s.spill.end
	s.spill.end += huge
	s.mu.Unlock()
	_, err := f.WriteAt(p.buf[:p.n], off)
	s.mu.Lock()
	if err != nil {
		return fmt.Errorf("spill file: %w", err)
	}
	s.recycle(l, p.buf, nil)
	p.buf, p.spill = nil, off
	return nil
}

// unspill reads a pack back into buf and frees its space in the file.
func (s *spill) unspill(p *pack, buf []byte) error {
	if _, err := s.f.ReadAt(buf[:p.n], p.spill); err != nil {
		return fmt.Errorf("spill file: %w", err)
	}
	// Without support for this, only disk space is lost.
	_ = unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, p.spill, huge)
	return nil
}
