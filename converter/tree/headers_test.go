package tree

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	tt "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// TestRandomHeaders compares tars with unusual headers with containerd: fields and records with
// extreme values, malformed, or in the wrong place.
func TestRandomHeaders(t *testing.T) {
	requireRoot(t)
	seed, count := *seedFlag, 10*(*stacksFlag)
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	if testing.Short() {
		count = min(count, 60)
	}
	applied := 0
	for i := range count {
		g := mangler{rand.New(rand.NewPCG(seed+uint64(i), 1))}
		stack := [][]byte{g.tar()}
		if g.r.IntN(2) == 0 {
			stack = append(stack, g.tar())
		}
		if _, _, err := mergeAll(t, stack); err == nil {
			applied++
		} else if strings.Contains(err.Error(), "does not fit 32 bits") {
			continue // see layer.FromTar
		}
		probe := &quiet{TB: t}
		if compare(probe, stack); probe.message != "" {
			t.Fatalf("-tree.seed=%d -tree.stacks=1\n%s", seed+uint64(i), probe.message)
		}
	}
	t.Logf("%d stacks from seed %d, of which %d can be applied", count, seed, applied)
}

// mangler makes tars from raw headers.
type mangler struct{ r *rand.Rand }

func (g mangler) pick(from ...string) string { return from[g.r.IntN(len(from))] }

func (g mangler) tar() []byte {
	out := slices.Concat(rawHeader(tar.TypeDir, "qd", 0), rawHeader(tar.TypeReg, "qa", 3), block("abc"))
	for range 1 + g.r.IntN(3) {
		if g.r.IntN(5) == 0 {
			records := g.records()
			out = append(append(out, rawHeader(tar.TypeXHeader, "PaxHeaders/x", len(records))...), block(records)...)
		}
		if g.r.IntN(15) == 0 {
			long := g.pick("q"+strings.Repeat("x", g.r.IntN(300)), "qa", "qd/qe\x00junk", "",
				strings.Repeat("q/", 300)) + g.pick("", "\x00")
			out = append(append(out, rawHeader(g.pick("L", "K")[0], "././@LongLink", len(long))...), block(long)...)
		}
		size := g.r.IntN(2) * g.r.IntN(1200)
		h := rawHeader(g.pick("0", "0", "0", "0", "0", "0", "5", "5", "5", "2", "2", "2", "2", "1", "3", "4", "6",
			"\x00", g.pick("7", "V", "N"))[0],
			g.pick("qa", "qb", "qd", "qd/", "qd/qb", "qs", "qs/qt", "./qa", "/qa", "qa/", "qd/.wh.qb",
				"qd/.wh..wh..opq", ".wh.qd", "q/../qa", strings.Repeat("n", 100)), size)
		copy(h[157:], g.pick("qa", "qd", "", "qd/qb", "/qd", "..", "qs", "../qd/qb", "qd/"))
		for g.r.IntN(5) == 0 {
			g.change(h)
		}
		tt.SetChecksum(h)
		out = append(append(out, h...), block(strings.Repeat("b", size))...)
	}
	switch g.r.IntN(20) {
	case 0:
		return out
	case 1:
		return out[:len(out)-g.r.IntN(600)]
	case 2:
		return append(out, make([]byte, 512)...)
	}
	return append(out, make([]byte, 1024+g.r.IntN(2))...)
}

// change writes something unusual into one field.
func (g mangler) change(h []byte) {
	switch g.r.IntN(9) {
	case 0: // mode
		copy(h[100:108], g.pick("0007777\x00", "0100644\x00", "0040755\x00", "0120777\x00", "7777777\x00", "        ",
			"\x80\x00\x00\x00\x00\x01\xff\xff", "\xff\xff\xff\xff\xff\xff\xff\xff", "644 \x00\x00\x00\x00"))
	case 1: // owner or group
		copy(h[108+8*g.r.IntN(2):], g.pick("\x80\x00\x00\x00\xff\xff\xff\xff", "\x80\x00\x00\x00\xff\xff\xff\xfe",
			"\xff\xff\xff\xff\xff\xff\xff\xff", "\xff\xff\xff\xff\xff\xff\xff\xf0", "7777777\x00",
			"\xff\xff\xff\xff\x80\x00\x00\x00"))
	case 2: // time
		copy(h[136:148], g.pick("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00",
			"\x80\x00\x00\x00\x00\x00\x00\x02\x80\x00\x00\x00", "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff",
			"77777777777\x00", "            ", "00000000000\x00"))
	case 3: // magic
		copy(h[257:], g.pick("ustar  \x00", "ustar\x0000", "\x00\x00\x00\x00\x00\x00\x00\x00", "ustar\x00tar"))
	case 4: // prefix, and GNU's times
		copy(h[345:], g.pick("qprefix", "qd", "/qd", "../q", "qd/\x00", "00000000001\x0000000000002\x00"))
	case 5: // device
		copy(h[329:], g.pick("0000001\x000000003\x00", "7777777\x007777777\x00",
			"\x80\x00\x00\x00\x00\xff\xff\xff\x80\x00\x00\x00\xff\xff\xff\xff", "               \x00",
			"\xff\xff\xff\xff\xff\xff\xff\xff", "\x80\x00\x00\x01\x00\x00\x00\x00"))
	case 6:
		copy(h[157:257], strings.Repeat("q", 100))
	case 7:
		copy(h[508:], "tar\x00")
	default:
		h[g.r.IntN(len(h))] = byte(g.r.Uint32())
		if h[156] == tar.TypeXGlobalHeader || h[156] == tar.TypeGNUSparse {
			h[156] = tar.TypeReg // see layer.FromTar
		}
	}
}

// records returns PAX records.
func (g mangler) records() string {
	const sets = "\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	var all string
	for range 1 + g.r.IntN(2) {
		key, value := "comment", ""
		switch g.r.IntN(17) / 2 {
		case 0:
			key, value = "path",
				g.pick("qx", "qd/qy", "", "/", ".", "qd/", "qa", "qd/.wh.qb", "./qd//qz/", "qd/../qw", ".wh..wh..opq",
					"q\x01", "../qq")
		case 1:
			key, value = "linkpath", g.pick("qa", "qd/qb", "", "/qa", "../qa", "qs/", "qd/../qa")
		case 2:
			key, value = "size", g.pick("0", "3", "600", "-1", "", "0003", " 3", "1e2")
		case 3:
			key, value = g.pick("uid", "gid"),
				g.pick("0", "1000", "-1", "-5", "4294967295", "4294967294", "-2147483648", "", "x", "2147483648")
		case 4:
			key, value = g.pick("mtime", "atime", "ctime"),
				g.pick("0", "-1", "1.5", "-1.5", "-0.5", "1.", ".5", "1.999999999999", "9223372036.854775807",
					"9223372036.854775808", "1e9", "", "99999999999999999999", "-9999999999.9", "00001.000000001")
		case 5:
			key, value = "SCHILY.xattr."+
				g.pick("user.a", "trusted.x", "user.b=c", "security.x", "", "x", aclAccess, aclDefault),
				g.pick("", "v", "a=b", "a\nb", "\x00\x01", aclWithUser, aclModeOnly, aclWithUser[:12],
					"\x02\x00\x00\x00")
		case 6:
			key, value = "SCHILY.xattr.security.capability",
				g.pick("v", "\x01\x00\x00\x02"+sets, "\x03\x00\x00\x02"+sets, "\x01\x00\x00\x03"+sets,
					"\x00\x00\x00\x03"+sets+"\x07\x00\x00\x00", "\x00\x00\x00\x03"+sets+"\xff\xff\xff\xff",
					"\x05\x00\x00\x03"+sets+"\x07\x00\x00\x00")
		case 7:
			key, value = g.pick("uname", "hdrcharset", "LIBARCHIVE.xattr.user.x", "SCHILY.fflags", "SCHILY.acl.access",
				"SCHILY.devmajor"), g.pick("root", "BINARY", "", "user::rwx,group::r-x,other::r-x", "12")
		default:
			all += g.pick("0 \n", "5 a\n", "10 path=x", "6 a=b\nxx", "\x00\x00", "99999999999 a=b\n", "")
			continue
		}
		all += tt.PAXRecord(key, value)
	}
	return all
}

func rawHeader(typ byte, name string, size int) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x0012345670123\x00", size))
	h[156] = typ
	copy(h[257:], "ustar\x0000")
	tt.SetChecksum(h)
	return h
}

// block pads contents to whole blocks.
func block(s string) []byte {
	return append([]byte(s), bytes.Repeat([]byte{0}, -len(s)&511)...)
}
