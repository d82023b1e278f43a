package daxfs

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestPlanEmptyRoot(t *testing.T) {
	p, err := NewPlan(&Node{Mode: unix.S_IFDIR | 0o755}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Place(Placement{0, BlockSize, BlockSize + p.MetaSize()}); err != nil {
		t.Fatal(err)
	}
	t.Log(p)
}
