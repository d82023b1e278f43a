package pagemap

import (
	"os"
	"testing"
)

// Addresses and counts of a mapping are parsed from the kernel's format.
func TestReadOwnPages(t *testing.T) {
	p, err := Read(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Text[exe]) == 0 {
		t.Errorf("no page of this program's text found; found %d files", len(p.Text))
	}
	if p.Mapped < len(p.Frames) {
		t.Errorf("%d pages mapped on %d physical pages", p.Mapped, len(p.Frames))
	}
	if os.Getuid() == 0 {
		for _, frame := range p.Text[exe] {
			if frame == 0 {
				t.Error("root cannot see page frame numbers")
			}
			break
		}
	}
}
