package region

import (
	"errors"
	"testing"
)

func TestInUse(t *testing.T) {
	h := fakeHost(t, map[string]string{
		"sys/block/loop3/loop/backing_file":        "/var/pool\n",
		"proc/self/mountinfo":                      "40 1 0:50 / /mnt/b ro - erofs /var/other ro,directio,fsoffset=6291456\n",
		"sys/dev/block/259:0/holders/dm-0/dm/name": "daxfs-0123",
		"sys/dev/block/259:1/size":                 "8",
	}, nil)
	for path, busy := range map[string]bool{"/var/pool": true, "/var/other": true, "/var/free": false, "": false} {
		if err := h.inUse(Info{Path: path}); errors.Is(err, ErrBusy) != busy || !busy && err != nil {
			t.Errorf("%q: %v, expected busy %v", path, err, busy)
		}
	}
	if err := h.held(259, 0); !errors.Is(err, ErrBusy) {
		t.Errorf("device with a window: %v, expected ErrBusy", err)
	}
	if err := h.held(259, 1); err != nil {
		t.Errorf("device without windows: %v", err)
	}
}
