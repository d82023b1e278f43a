package tree

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	tt "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// stack is a list of layers, the bottom one first.
type stack [][]tt.File

func (s stack) tars() [][]byte {
	var out [][]byte
	for _, files := range s {
		out = append(out, tt.Tar(files...))
	}
	return out
}

const (
	fileCap = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	// version 3 without the root user
	capOf3 = "\x01\x00\x00\x03" + "\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

var (
	aclWithUser = string(acl{
		{aclUserObj, 7, aclNoID},
		{aclUser, 5, 1000},
		{aclGroupObj, 5, aclNoID},
		{aclMask, 7, aclNoID},
		{aclOther, 0, aclNoID},
	}.value())
	aclModeOnly = string(acl{{aclUserObj, 7, aclNoID}, {aclGroupObj, 5, aclNoID}, {aclOther, 5, aclNoID}}.value())
	at          = func(sec, nsec int64) time.Time { return time.Unix(sec, nsec) }
	n255        = strings.Repeat("n", 255)
)

// rules has one stack of layers for each rule. Containerd defines the expected result. The second
// field is the error of Merge; if it is nil, containerd must succeed, too, else fail.
var rules = []struct {
	name string
	want error
	s    stack
}{
	{"nothing", nil, stack{{}}},
	{"every type", nil, stack{{
		tt.Dir("d"), tt.Reg("d/f", "x"), tt.Sym("d/s", "f"), tt.Hard("d/h", "d/f"),
		tt.Special(tar.TypeFifo, "d/p", 0, 0),
		tt.Special(tar.TypeChar, "d/c", 1, 3), tt.Special(tar.TypeBlock, "d/b", 259, 70000),
		tt.Special(tar.TypeChar, "d/wh", 0, 0),
	}}},
	{"modes and owners", nil, stack{{
		tt.Dir("d").Perm(0o7777).Own(1<<32-2, 5),
		tt.Reg("f", "").Perm(0o6711).Own(1000, 1<<32-2), tt.Sym("s", "f").Own(3, 4).Perm(0o600),
		tt.Reg("none", "").Perm(0),
	}}},
	{"owner that stays", nil, stack{
		{tt.Dir("d").Own(5, 6), tt.Dir("s").Own(7, 8).Perm(0o2755)},
		{
			tt.Dir("d").Own(1<<32-1, 1<<32-1), tt.Reg("f", "").Own(1<<32-1, 1<<32-1),
			tt.Reg("s/f", "").Own(1<<32-1, 1<<32-1),
		},
	}},
	{"times", nil, stack{{
		tt.Reg("ns", "").At(at(1, 999_999_999)), tt.Reg("old", "").At(at(-5, 0)),
		tt.Reg("older", "").At(at(-1, 999_999_999)),
		tt.Reg("late", "").At(at(1<<33, 7)), tt.Reg("later", "").At(at(1<<34, 0)),
		gnuFormat(tt.Reg("last", "")).At(at(1<<63-1, 0)), tt.Sym("s", "x").At(at(9, 9)), tt.Dir("d").At(at(8, 8)),
		tt.Reg("d/f", ""),
	}}},
	{
		"time of a directory that is changed later", nil,
		stack{{tt.Dir("d").At(at(8, 8))}, {tt.Reg("d/f", "")}, {tt.Dir("d").At(at(9, 9)), tt.Reg(".wh.d/f", "")}},
	},
	{"time of a directory whose name stands for another", nil, stack{
		{tt.Dir("a"), tt.Dir("b"), tt.Sym("l", "a")},
		{tt.Dir("l/sub").At(at(7, 7)), tt.Dir("b/sub"), tt.Sym("l", "b")},
	}},
	{"directory entry that is a file in the end", nil, stack{{tt.Dir("a").At(at(7, 7)), tt.Reg("a", "").At(at(8, 8))}}},
	{"directory entry that is gone in the end", ErrNotExist, stack{{tt.Dir("a"), tt.Reg(".wh.a", "")}}},
	{"root entry", nil, stack{{tt.Dir("./").Perm(0o700).Own(1, 2), tt.Dir("/").Perm(0o711), tt.Dir("..").Perm(0o712)}}},

	{"whiteout", nil, stack{{tt.Dir("d"), tt.Reg("d/a", "1"), tt.Reg("d/b", "2")}, {tt.Reg("d/.wh.a", "")}}},
	{"whiteout of a directory", nil, stack{{tt.Dir("d/e"), tt.Reg("d/e/f", "1")}, {tt.Reg(".wh.d", "")}}},
	{"whiteout of nothing", nil, stack{{tt.Reg(".wh.a", ""), tt.Reg("new/.wh.b", "")}}},
	{"whiteout, then the same name", nil, stack{
		{tt.Dir("d").X("user.a", "1"), tt.Reg("d/old", "")},
		{tt.Reg(".wh.d", ""), tt.Dir("d"), tt.Reg("d/new", "")},
	}},
	{"name, then its whiteout", nil, stack{{tt.Reg("a", "1")}, {tt.Reg("a", "2"), tt.Reg(".wh.a", "")}}},
	{"whiteout of any type", nil, stack{
		{tt.Reg("a", ""), tt.Reg("b", ""), tt.Reg("c", "")},
		{tt.Dir(".wh.a"), tt.Sym(".wh.b", "x"), tt.Hard(".wh.c", "none")},
	}},
	{
		"whiteout through a symbolic link", nil,
		stack{{tt.Reg("d/a", ""), tt.Sym("l", "d"), tt.Sym("m", "/l")}, {tt.Reg("m/.wh.a", "")}},
	},
	{
		"whiteout does not follow the last element", nil,
		stack{{tt.Reg("d/a", ""), tt.Sym("l", "d")}, {tt.Reg(".wh.l", "")}},
	},
	{"whiteout of a name of 255 bytes", nil, stack{{tt.Reg(n255, "")}, {tt.Reg(".wh."+n255, "")}}},
	{"whiteout of names that look special", nil, stack{
		{tt.Reg("..a", ""), tt.Reg(".b", ""), tt.Reg("...", "")},
		{tt.Reg(".wh...a", ""), tt.Reg(".wh..b", ""), tt.Reg(".wh....", "")},
	}},
	{"whiteout of .", layer.ErrInvalid, stack{{tt.Reg(".wh..", "")}}},
	{
		"aufs directory", nil,
		stack{{tt.Dir(".wh..wh.plnk"), tt.Reg(".wh..wh.plnk/1.2", "x"), tt.Reg(".wh..wh.aufs", "")}},
	},
	{
		"names with the prefix elsewhere", nil,
		stack{{tt.Reg("a.wh.b", ""), tt.Reg("wh.", ""), tt.Reg(".wh", ""), tt.Reg(" .wh.a", "")}},
	},

	{"opaque, first", nil, stack{
		{tt.Reg("d/a", "1"), tt.Reg("d/e/x", "1")},
		{tt.Dir("d"), tt.Reg("d/.wh..wh..opq", ""), tt.Reg("d/b", "2")},
	}},
	{"opaque, last", nil, stack{
		{tt.Dir("d"), tt.Reg("d/a", "1"), tt.Dir("d/e"), tt.Reg("d/e/x", "1")},
		{tt.Dir("d"), tt.Reg("d/b", "2"), tt.Dir("d/e"), tt.Reg("d/e/y", ""), tt.Reg("d/.wh..wh..opq", "")},
	}},
	{"opaque, twice", nil, stack{
		{tt.Reg("d/a", "1")},
		{
			tt.Dir("d"), tt.Reg("d/b", "2"), tt.Reg("d/.wh..wh..opq", ""), tt.Reg("d/c", "3"),
			tt.Reg("d/.wh..wh..opq", ""),
		},
	}},
	{"opaque within opaque", nil, stack{
		{tt.Reg("d/e/a", "1"), tt.Reg("d/f/a", "1")},
		{
			tt.Dir("d"), tt.Dir("d/e"), tt.Reg("d/e/b", "2"), tt.Reg("d/e/.wh..wh..opq", ""),
			tt.Reg("d/.wh..wh..opq", ""),
		},
	}},
	{"opaque root", nil, stack{{tt.Reg("d/a", "1"), tt.Reg("b", "")}, {tt.Reg("c", ""), tt.Reg(".wh..wh..opq", "")}}},
	{"opaque directory that is missing", nil, stack{{tt.Reg("d/e/.wh..wh..opq", "")}}},
	{
		"opaque directory through a symbolic link", nil,
		stack{{tt.Reg("d/a", "1"), tt.Sym("l", "d")}, {tt.Reg("l/.wh..wh..opq", ""), tt.Reg("l/b", "")}},
	},
	{"opaque file", ErrNotDir, stack{{tt.Reg("d", "1")}, {tt.Reg("d/.wh..wh..opq", "")}}},

	{
		"file becomes a directory and back", nil,
		stack{{tt.Reg("a", "1")}, {tt.Dir("a"), tt.Reg("a/b", "2")}, {tt.Reg("a", "3")}},
	},
	{
		"directory becomes a link and back", nil,
		stack{{tt.Dir("a"), tt.Reg("a/b", "2")}, {tt.Sym("a", "c"), tt.Dir("c")}, {tt.Dir("a")}},
	},
	{"directory on a directory", nil, stack{
		{tt.Dir("a").X("user.a", "1").X("user.b", "1"), tt.Reg("a/b", "2")},
		{tt.Dir("a").Perm(0o700).Own(3, 4).X("user.b", "2").X("user.c", "2")},
	}},
	{"file on a file", nil, stack{{tt.Reg("a", "1").X("user.a", "1").Own(1, 1)}, {tt.Reg("a", "2")}}},
	{"duplicates in a layer", nil, stack{{
		tt.Reg("a", "1"), tt.Reg("./a", "2"), tt.Dir("d"), tt.Reg("d/x", ""),
		tt.Dir("d/").Perm(0o700), tt.Sym("s", "1"), tt.Sym("s", "2"),
	}}},
	{"missing parents", nil, stack{{tt.Reg("a/b/c", "1")}, {tt.Reg("a/x/y", "2")}}},
	{
		"missing parents in a set-group-ID directory", nil,
		stack{{tt.Dir("a").Perm(0o2755).Own(0, 7)}, {tt.Reg("a/x/y/z", "2")}},
	},

	{
		"hard link to a lower layer", nil,
		stack{{tt.Reg("a", "1").Own(5, 6)}, {tt.Hard("b", "a").Own(7, 8).Perm(0o600).At(at(3, 3))}},
	},
	{"hard link outlives its target", nil, stack{{tt.Reg("a", "1"), tt.Hard("b", "a")}, {tt.Reg(".wh.a", "")}}},
	{
		"hard link to a replaced name", nil,
		stack{{tt.Reg("a", "1"), tt.Hard("b", "a"), tt.Hard("c", "b")}, {tt.Reg("b", "2"), tt.Hard("d", "b")}},
	},
	{"hard link to every type", nil, stack{{
		tt.Sym("s", "nowhere"), tt.Special(tar.TypeFifo, "p", 0, 0),
		tt.Special(tar.TypeChar, "c", 1, 3), tt.Hard("s2", "s").Own(1, 2).At(at(5, 5)), tt.Hard("p2", "p"),
		tt.Hard("c2", "c").Perm(0o666),
	}}},
	{"hard link spelled otherwise", nil, stack{{
		tt.Reg("d/a", "1"), tt.Sym("l", "d"), tt.Hard("b", "/d/a"),
		tt.Hard("c", "./d/../l/a"), tt.Hard("e", "../../d//a"), tt.Hard("f", "l/./a"), tt.Hard("g", "none/../d/a"),
	}}},
	{"hard link to a hidden file", nil, stack{{
		tt.Reg(".a", "1"), tt.Reg("a", "2"), tt.Reg("..b", "3"),
		tt.Hard("c", ".a"), tt.Hard("d", "./.a"), tt.Hard("e", "..b"),
	}}},
	{
		"hard link with a trailing slash follows", nil,
		stack{{tt.Reg("a", "1"), tt.Sym("l", "a"), tt.Hard("b", "l/"), tt.Hard("c", "l/.")}},
	},
	{"hard link to a missing file", ErrNotExist, stack{{tt.Hard("a", "none")}}},
	{"hard link to itself", ErrNotExist, stack{{tt.Reg("a", "1"), tt.Hard("a", "a")}}},
	{"hard link to a directory", ErrIsDir, stack{{tt.Dir("d"), tt.Hard("a", "d")}}},
	{"hard link to nothing", ErrIsDir, stack{{tt.Hard("a", "")}}},
	{"hard link out of the root", ErrIsDir, stack{{tt.Hard("a", "../..")}}},
	{"hard link to what it replaces", ErrNotExist, stack{{tt.Reg("d/a", ""), tt.Hard("d", "d/a")}}},
	{
		"hard link takes capabilities away", nil,
		stack{{tt.Reg("a", "1").X("security.capability", fileCap).X("user.a", "1"), tt.Hard("b", "a")}},
	},
	{
		"hard link gives capabilities", nil,
		stack{{tt.Reg("a", "1"), tt.Hard("b", "a").X("security.capability", fileCap)}},
	},

	{
		"symbolic link in a parent", nil,
		stack{{tt.Dir("c"), tt.Sym("a", "c")}, {tt.Reg("a/b", "1"), tt.Dir("a/d").At(at(5, 0))}},
	},
	{"symbolic links in a row", nil, stack{{
		tt.Dir("x/y"), tt.Sym("a", "b"), tt.Sym("b", "./x/"),
		tt.Sym("x/l", "../a/y"), tt.Sym("x/y/up", "../.."),
	}, {tt.Reg("a/l/up/b/f", "1")}}},
	{
		"symbolic link out of the root", nil,
		stack{{tt.Sym("a", "../../../b"), tt.Sym("c", "/../d"), tt.Reg("a/f", "1"), tt.Reg("c/f", "2")}},
	},
	{
		"symbolic link to the root", nil,
		stack{{tt.Sym("a", "/"), tt.Sym("b", "."), tt.Reg("a/f", "1"), tt.Reg("b/g", "2"), tt.Dir("a/b/a/d")}},
	},
	{"symbolic link to nothing", nil, stack{{tt.Sym("a", "x/y"), tt.Reg("a/f", "1")}}},
	{"symbolic link to a file", ErrNotDir, stack{{tt.Reg("x", ""), tt.Sym("a", "x"), tt.Reg("a/f", "1")}}},
	{"symbolic link to itself", ErrTooManyLinks, stack{{tt.Sym("a", "a"), tt.Reg("a/f", "1")}}},
	{
		"symbolic links in a circle", ErrTooManyLinks,
		stack{{tt.Sym("a", "b/x"), tt.Sym("b", "a/y"), tt.Reg("a/f", "1")}},
	},
	{"symbolic link and ..", nil, stack{{
		tt.Dir("x/y"), tt.Sym("l", "x/y"), tt.Sym("m", "l/../z"),
		tt.Sym("x/k", "../l/../w"), tt.Reg("m/f", "1"), tt.Reg("x/k/f", "2"),
	}}},
	{
		"symbolic link that changes while a layer is applied", nil,
		stack{{
			tt.Dir("x"), tt.Dir("y"), tt.Sym("l", "x"), tt.Reg("l/a", ""), tt.Sym("l", "y"), tt.Reg("l/b", ""),
			tt.Reg(".wh.l", ""), tt.Reg("l/c", ""),
		}},
	},
	{
		"symbolic link that appears where a parent was made", nil,
		stack{{
			tt.Dir("x"), tt.Reg("l/m/a", ""), tt.Sym("l", "x"), tt.Reg("l/m/b", ""), tt.Sym("s", "x"),
			tt.Reg("s/m/c", ""), tt.Hard("x/m", "s"), tt.Reg("s/m/d", ""),
		}},
	},
	{"deep directories", nil, stack{{
		tt.Dir(strings.Repeat("d/", 1500)), tt.Sym("l", "d/d/d"),
		tt.Reg("l/"+strings.Repeat("d/", 400)+"f", ""), tt.Dir("l/" + strings.Repeat("d/", 400) + "g"),
	}}},
	{"symbolic link to a name of 256 bytes", layer.ErrLimit, stack{{tt.Sym("l", "n"+n255), tt.Reg("l/f", "1")}}},
	{
		"symbolic link to a name of 256 bytes in nothing", layer.ErrLimit,
		stack{{tt.Sym("l", "none/n"+n255), tt.Reg("l/f", "1")}},
	},
	{
		"symbolic link through a name of 256 bytes", layer.ErrLimit,
		stack{{tt.Sym("l", "n"+n255+"/../d"), tt.Reg("l/f", "1")}},
	},
	{
		"symbolic link through a name of 256 bytes in nothing", nil,
		stack{{tt.Sym("l", "none/n"+n255+"/../d"), tt.Reg("l/f", "1")}},
	},
	{"last element is not followed", nil, stack{{tt.Dir("d"), tt.Sym("l", "d")}, {tt.Dir("l").Own(1, 1)}}},
	{"chain of symbolic links", nil, stack{chain(255)}},
	{"chain of too many symbolic links", ErrTooManyLinks, stack{chain(257)}},
	{"below a file", ErrNotDir, stack{{tt.Reg("a", "1")}, {tt.Reg("a/b", "1")}}},
	{"further below a file", ErrNotDir, stack{{tt.Reg("a", "1")}, {tt.Reg("a/b/c", "1")}}},

	{"absolute name", nil, stack{{tt.Reg("/a/b", "1"), tt.Reg("//c", "")}}},
	{"name with ..", nil, stack{{tt.Reg("../a", "1"), tt.Reg("x/../b", ""), tt.Reg("../../x/y/../c", "")}}},
	{"odd names", nil, stack{{
		tt.Reg(n255, ""), tt.Reg("\xff\xfe\n\t", ""), tt.Reg("ü b", ""), tt.Reg("a\\b", ""),
		tt.Reg(`"'$(x)`, ""), tt.Dir("-rf"), tt.Reg(strings.Repeat(n255[1:]+"/", 10)+"x", ""),
	}}},
	{"names of GNU tar", nil, stack{{
		gnuFormat(tt.Reg(strings.Repeat("dir/", 50)+"file", "1")),
		gnuFormat(tt.Sym("s", strings.Repeat("t/", 200))),
		gnuFormat(tt.Hard("h", strings.Repeat("dir/", 50)+"file")),
	}}},
	{"name of 256 bytes", layer.ErrLimit, stack{{tt.Reg("n"+n255, "")}}},
	{"symbolic link to nothing at all", layer.ErrInvalid, stack{{tt.Sym("a", "")}}},
	{"device numbers", nil, stack{{
		tt.Special(tar.TypeChar, "a", 4095, 1<<20-1),
		tt.Special(tar.TypeBlock, "b", 4096, 1<<20), gnuFormat(tt.Special(tar.TypeBlock, "c", 1<<32-1, 1<<32-1)),
	}}},
	{"device number out of range", layer.ErrInvalid, stack{{gnuFormat(tt.Special(tar.TypeChar, "a", 1<<32, 0))}}},
	{"device number of a fifo", layer.ErrInvalid, stack{{gnuFormat(tt.Special(tar.TypeFifo, "a", 1<<32, 0))}}},
	{"global header", nil, stack{
		{tt.Reg("GlobalHead.0.0", "x")},
		{{Header: tar.Header{
			Typeflag:   tar.TypeXGlobalHeader,
			PAXRecords: map[string]string{"path": "x", "SCHILY.xattr.user.a": "1"},
		}}, tt.Reg("a", "")},
	}},

	{"xattrs", nil, stack{{tt.Reg("a", "").X("user.a", "").X("user.b", "\x00\xff").X("security.x",
		"1").X("security.capability", fileCap), tt.Dir("d").X("user.a", "1").X("security.capability", fileCap)}}},
	{"xattrs that containerd ignores", nil, stack{{
		tt.Reg("a", "").X("trusted.a", "1").X("trusted.overlay.opaque", "y").X("com.apple.a", "1").X("system.x",
			"1").X("x", "1"),
		tt.Sym("s", "x").X("user.a", "1").X("security.x", "1"),
		tt.Special(tar.TypeFifo, "p", 0, 0).X("user.a", "1").X("security.x", "2"),
		tt.Hard("s2", "s").X("user.a", "1"),
	}}},
	{"capability that is none", layer.ErrInvalid, stack{{tt.Reg("a", "").X("security.capability", "x")}}},
	{
		"capability with an unknown flag", layer.ErrInvalid,
		stack{{tt.Reg("a", "").X("security.capability", "\x03"+fileCap[1:])}},
	},
	{"capability of version 3", nil, stack{{tt.Reg("a", "").X("security.capability", capOf3+"\xe8\x03\x00\x00")}}},
	{"capability of version 3 for root", nil, stack{
		{
			tt.Reg("a", "").X("security.capability", capOf3+"\x00\x00\x00\x00"),
			tt.Dir("d").X("security.capability", "\x01"+capOf3[1:]+"\x00\x00\x00\x00"),
		},
	}},
	{
		"capability of nobody", layer.ErrInvalid,
		stack{{tt.Reg("a", "").X("security.capability", capOf3+"\xff\xff\xff\xff")}},
	},
	{
		"capability of version 3 with an unknown flag", layer.ErrInvalid,
		stack{{tt.Reg("a", "").X("security.capability", "\x04"+capOf3[1:]+"\xe8\x03\x00\x00")}},
	},
	{"xattr name without an end", layer.ErrInvalid, stack{{tt.Reg("a", "").X("user.", "x")}}},
	{"xattr without a name", layer.ErrInvalid, stack{{tt.Reg("a", "").X("", "x")}}},
	{"ACL", nil, stack{{
		tt.Reg("a", "").X(aclAccess, aclWithUser).Perm(0o640),
		tt.Dir("d").X(aclAccess, aclWithUser).X(aclDefault, aclWithUser).Perm(0o700),
	}}},
	{"ACL that says no more than the mode", nil, stack{{
		tt.Reg("a", "").X(aclAccess, aclModeOnly),
		tt.Dir("d").X(aclDefault, aclModeOnly), tt.Reg("d/f", ""), tt.Dir("d/e"),
	}}},
	{"ACL that is inherited", nil, stack{
		{
			tt.Dir("d").X(aclDefault, aclWithUser), tt.Reg("d/f", "").Perm(0o604), tt.Dir("d/e").Perm(0o2711),
			tt.Sym("d/s", "f"), tt.Special(tar.TypeFifo, "d/p", 0, 0),
		},
		{tt.Reg("d/e/missing/f", "").Perm(0o777), tt.Dir("d/e").X(aclDefault, ""), tt.Reg("d/e/g", "")},
	}},
	{
		"ACL and chmod", nil,
		stack{{tt.Dir("d").X(aclAccess, aclWithUser)}, {tt.Dir("d").Perm(0o712)}, {tt.Dir("d").X(aclAccess, "")}},
	},
	{"ACL through a hard link", nil, stack{{tt.Reg("a", "").X(aclAccess, aclWithUser), tt.Hard("b", "a").Perm(0o421)}}},
	{"ACL of a symbolic link", nil, stack{{tt.Sym("a", "b").X(aclAccess, aclWithUser)}}},
	{"ACL of a symbolic link, incomplete", nil, stack{{tt.Sym("a", "b").X(aclAccess, aclWithUser[:12])}}},
	{"ACL of a symbolic link, cut short", layer.ErrInvalid, stack{{tt.Sym("a", "b").X(aclAccess, aclWithUser[:7])}}},
	{
		"ACL of a symbolic link, with an unknown entry", layer.ErrInvalid,
		stack{{tt.Sym("a", "b").X(aclAccess, aclWithUser[:4]+"\x03"+aclWithUser[5:])}},
	},
	{
		"ACL of a symbolic link, for nobody", layer.ErrInvalid,
		stack{{tt.Sym("a", "b").X(aclAccess,
			strings.Replace(aclWithUser, "\xe8\x03\x00\x00", "\xff\xff\xff\xff", 1))}},
	},
	{
		"ACL for nobody", layer.ErrInvalid,
		stack{{tt.Reg("a", "").X(aclAccess, strings.Replace(aclWithUser, "\xe8\x03\x00\x00", "\xff\xff\xff\xff", 1))}},
	},
	{"ACL of another version", nil, stack{{tt.Reg("a", "").X(aclAccess, "\x01"+aclWithUser[1:])}}},
	{"ACL of another version cut short", nil, stack{{tt.Reg("a", "").X(aclAccess, "\x01"+aclWithUser[1:7])}}},
	{"default ACL of a file", layer.ErrInvalid, stack{{tt.Reg("a", "").X(aclDefault, aclWithUser)}}},
	{"ACL cut short", layer.ErrInvalid, stack{{tt.Reg("a", "").X(aclAccess, aclWithUser[:7])}}},
	{"ACL without others", layer.ErrInvalid, stack{{tt.Reg("a", "").X(aclAccess, aclWithUser[:len(aclWithUser)-8])}}},
	{"ACL without a mask", layer.ErrInvalid, stack{{tt.Reg("a", "").X(aclAccess, aclWithUser[:28]+aclWithUser[36:])}}},
	{
		"ACL out of order", layer.ErrInvalid,
		stack{{tt.Reg("a", "").X(aclAccess, aclWithUser[:4]+aclWithUser[12:20]+aclWithUser[4:12]+aclWithUser[20:])}},
	},
	{"contiguous file", layer.ErrUnsupported, stack{{tt.Special(tar.TypeCont, "a", 0, 0)}}},
}

// chain returns n symbolic links in sequence and a file at their end.
func chain(n int) []tt.File {
	files := []tt.File{tt.Dir(fmt.Sprint(n))}
	for i := range n {
		files = append(files, tt.Sym(fmt.Sprint(i), fmt.Sprint(i+1)))
	}
	return append(files, tt.Reg("0/f", ""))
}

func gnuFormat(f tt.File) tt.File {
	f.Format, f.ModTime = tar.FormatGNU, at(1_600_000_000, 0)
	return f
}

func TestRules(t *testing.T) {
	requireRoot(t)
	for _, rule := range rules {
		t.Run(rule.name, func(t *testing.T) {
			if spared := compare(t, rule.s.tars()); spared > 0 {
				t.Errorf("was not compared: it touches the one deliberate difference")
			}
			if _, _, err := mergeAll(t, rule.s.tars()); !errors.Is(err, rule.want) || rule.want == nil && err != nil {
				t.Errorf("merge: %v, want %v", err, rule.want)
			}
		})
	}
}

// TestErrorNames: an error names the layer and the entry.
func TestErrorNames(t *testing.T) {
	_, err := mergeTars(stack{{tt.Reg("a", "")}, {tt.Dir("d"), tt.Reg("a/b", "")}})
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Layer != 1 || e.Change != 1 || e.Path != "a/b" ||
		err.Error() != `merge: layer 1: add "a/b": parent "a": not a directory` {
		t.Errorf("%v", err)
	}
}

// TestOpaqueHidesOnlyLower tests the one intended difference between Merge and containerd's walk into
// one directory: entries of the same layer whose parents have no entry. Here containerd with overlayfs
// is the oracle.
func TestOpaqueHidesOnlyLower(t *testing.T) {
	s := stack{
		{
			tt.Dir("d"), tt.Dir("d/sub").Own(4, 5), tt.Reg("d/sub/lower", "1"), tt.Reg("d/other/lower", "1"),
			tt.Reg("d/file", ""),
		},
		{tt.Dir("d"), tt.Reg("d/sub/deep/upper", "2"), tt.Reg("d/.wh..wh..opq", "")},
	}
	got, m, err := mergeAll(t, s.tars())
	if err != nil || m.spared == 0 {
		t.Fatalf("spared %d entries, %v", m.spared, err)
	}
	requireRoot(t)
	walked, _, err := applyAll(t, s.tars())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range walked {
		if strings.HasSuffix(e.Path, "upper") {
			t.Errorf("containerd keeps %q as well: there is no difference any more", e.Path)
		}
	}
	var lowers []string
	for _, b := range s.tars() {
		dir := t.TempDir()
		if _, err := archive.Apply(context.Background(), dir, bytes.NewReader(b),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(lowers)); err != nil {
			t.Fatal(err)
		}
		lowers = append([]string{dir}, lowers...)
	}
	_, merged := overlay(t, lowers, "")
	want, err := tt.FromPath(merged)
	if err != nil {
		t.Fatal(err)
	}
	d := tt.Diff(want, got, func(w, g *tt.Entry) {
		w.Mtime = g.Mtime // the applier copies the parent's time before it adds to the directory
		if w.Path == "." {
			*w = *g
		}
	})
	if d != "" {
		t.Errorf("trees differ (- overlayfs, + merge):\n%s", d)
	}
}

// TestOpaqueAgainSpares: directories in an opaque directory are spared again when a directory above
// becomes opaque.
func TestOpaqueAgainSpares(t *testing.T) {
	requireRoot(t)
	s := stack{{tt.Dir("d"), tt.Reg("d/.wh..wh..opq", ""), tt.Dir("d/a/b"), tt.Reg(".wh..wh..opq", "")}}
	got, m, err := mergeAll(t, s.tars())
	if err != nil || m.spared == 0 || got[len(got)-1].Path != "d/a/b" {
		t.Errorf("merge spared %d and ends with %q (%v), want it to spare d/a/b", m.spared, got[len(got)-1].Path, err)
	}
	if _, _, err := applyAll(t, s.tars()); err == nil {
		t.Error("containerd keeps d/a/b by now: there is no difference any more")
	}
}

// TestAbsoluteNames: a leading slash has no meaning. Containerd differs for links through links and "..".
func TestAbsoluteNames(t *testing.T) {
	requireRoot(t)
	for name, other := range map[string]bool{"c/f": false, "./c/f": false, "/c/f": true, "../c/f": true} {
		tars := stack{{tt.Dir("x/y"), tt.Sym("b", "x/y"), tt.Sym("c", "b/../z"), tt.Reg(name, "1")}}.tars()
		got, _, err := mergeAll(t, tars)
		if err != nil || !slices.ContainsFunc(got, func(e tt.Entry) bool { return e.Path == "x/z/f" }) {
			t.Errorf("%q: %v (%v), want x/z/f", name, got, err)
		}
		want, _, err := applyAll(t, tars)
		if err != nil {
			t.Fatal(err)
		}
		if is := !slices.ContainsFunc(want, func(e tt.Entry) bool { return e.Path == "x/z/f" }); is != other {
			t.Errorf("%q: containerd makes another file: %v, want %v", name, is, other)
		}
	}
}

// goroot returns the directory of the running Go distribution.
func goroot(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Skipf("needs the go command for the test data of its distribution: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// TestForeignTars compares the archives from the tests of archive/tar, which were written by several programs.
func TestForeignTars(t *testing.T) {
	requireRoot(t)
	files, _ := filepath.Glob(filepath.Join(goroot(t), "src/archive/tar/testdata/*.tar*"))
	if len(files) == 0 {
		t.Skip("needs the test data of the Go distribution")
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(file, ".bz2") {
				b, err = io.ReadAll(bzip2.NewReader(bytes.NewReader(b)))
			} else if strings.HasSuffix(file, ".base64") {
				b, err = base64.StdEncoding.DecodeString(string(b))
			}
			if err != nil {
				t.Fatal(err)
			}
			if size := totalSize(b); size > 64<<20 {
				t.Skipf("unfolds to %d bytes", size)
			}
			if bytes.Contains(b, []byte("sparse.tar")) || hasType(b, tar.TypeGNUSparse) {
				if _, _, err := applyAll(t, [][]byte{b}); err == nil {
					t.Error("containerd takes old GNU sparse files by now: compare them")
				}
				if _, _, err := mergeAll(t, [][]byte{b}); err != nil {
					t.Error(err)
				}
				return
			}
			compare(t, [][]byte{b})
		})
	}
}

func headers(b []byte) (all []*tar.Header) {
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err != nil {
			return all
		}
		all = append(all, h)
	}
}

func totalSize(b []byte) (size int64) {
	for _, h := range headers(b) {
		size += h.Size
	}
	return size
}

func hasType(b []byte, typ byte) bool {
	for _, h := range headers(b) {
		if h.Typeflag == typ {
			return true
		}
	}
	return false
}

// TestSparse compares with GNU tar in all its formats for holes. Containerd accepts only those of PAX.
func TestSparse(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "in"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "in/sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range int64(40) { // more pieces than fit a header
		if _, err := f.WriteAt([]byte(fmt.Sprint("piece ", i)), i*300_000+i); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(13_000_001); err != nil {
		t.Fatal(err)
	}
	want, err := tt.FromPath(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{
		"--format=gnu", "--format=pax --sparse-version=0.0",
		"--format=pax --sparse-version=0.1", "--format=pax --sparse-version=1.0",
	} {
		args := append(strings.Fields(format), "--sparse", "-cf", "-", "-C", filepath.Join(dir, "in"), ".")
		b, err := exec.Command("tar", args...).Output()
		if err != nil {
			t.Skipf("needs GNU tar: %v", err)
		}
		if len(b) > 1<<20 {
			t.Errorf("%s: tar of %d bytes has no holes", format, len(b))
		}
		got, _, err := mergeAll(t, [][]byte{b})
		if err != nil {
			t.Errorf("%s: %v", format, err)
			continue
		}
		d := tt.Diff(want, got, func(w, g *tt.Entry) {
			if w.Mtime.Sec == g.Mtime.Sec || w.Path == "." { // one format has no nanoseconds
				w.Mtime, w.UID, w.GID = g.Mtime, g.UID, g.GID
			}
		})
		if d != "" {
			t.Errorf("%s: trees differ (- disk, + merge):\n%s", format, d)
		}
	}
}
