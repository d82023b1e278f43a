package disk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"reflect"
	"testing"
)

// fieldBytes marshals a struct with one field at a time set to all ones, and lists the nonzero bytes.
// It pins every offset, although the product code uses no reflection.
func fieldBytes[T any](t *testing.T, size int, marshal func(*T, []byte), unmarshal func(*T, []byte)) map[string][2]int {
	t.Helper()
	got := map[string][2]int{}
	typ := reflect.TypeFor[T]()
	for i := range typ.NumField() {
		var v T
		ones(reflect.ValueOf(&v).Elem().Field(i))
		b := make([]byte, size)
		marshal(&v, b)
		first, last := -1, -1
		for at, x := range b {
			if x != 0 {
				if first < 0 {
					first = at
				}
				last = at
			}
		}
		got[typ.Field(i).Name] = [2]int{first, last - first + 1}
		var back T
		unmarshal(&back, b)
		if !reflect.DeepEqual(v, back) {
			t.Errorf("%s.%s: wrote %+v, read %+v", typ.Name(), typ.Field(i).Name, v, back)
		}
	}
	return got
}

func ones(v reflect.Value) {
	switch v.Kind() {
	case reflect.Array:
		for i := range v.Len() {
			ones(v.Index(i))
		}
	case reflect.Int64:
		v.SetInt(-1)
	default:
		v.SetUint(1<<v.Type().Bits() - 1)
	}
}

func TestOffsets(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want map[string][2]int // field: offset, bytes
	}{
		{
			"erofs super", fieldBytes(t, ErofsSuperSize, (*ErofsSuper).Marshal, (*ErofsSuper).Unmarshal),
			map[string][2]int{
				"Magic": {0, 4}, "Checksum": {4, 4}, "FeatureCompat": {8, 4}, "BlockBits": {12, 1}, "ExtSlots": {13, 1},
				"RootNid": {14, 2}, "Inos": {16, 8}, "EpochSec": {24, 8}, "EpochNsec": {32, 4}, "Blocks": {36, 4},
				"MetaBlock": {40, 4}, "XattrBlock": {44, 4}, "UUID": {48, 16}, "Label": {64, 16},
				"FeatureIncompat": {80, 4},
				"Compression":     {84, 2}, "ExtraDevices": {86, 2}, "DevTableSlot": {88, 2}, "DirBlockBits": {90, 1},
				"XattrPrefixes": {91, 1}, "XattrPrefixOff": {92, 4}, "PackedNid": {96, 8}, "XattrFilter": {104, 1},
			},
		},
		{
			"erofs dirent", fieldBytes(t, ErofsDirentSize, (*ErofsDirent).Marshal, (*ErofsDirent).Unmarshal),
			map[string][2]int{"Nid": {0, 8}, "NameOff": {8, 2}, "Type": {10, 1}},
		},
		{
			"erofs xattr header",
			fieldBytes(t, ErofsXattrHdrSize, (*ErofsXattrHeader).Marshal, (*ErofsXattrHeader).Unmarshal),
			map[string][2]int{"Filter": {0, 4}, "Shared": {4, 1}},
		},
		{
			"erofs xattr entry",
			fieldBytes(t, ErofsXattrEntSize, (*ErofsXattrEntry).Marshal, (*ErofsXattrEntry).Unmarshal),
			map[string][2]int{"NameLen": {0, 1}, "Index": {1, 1}, "ValueLen": {2, 2}},
		},
		{
			"digest entry", fieldBytes(t, DigestEntrySize, (*DigestEntry).Marshal, (*DigestEntry).Unmarshal),
			map[string][2]int{"Off": {0, 8}, "Size": {8, 8}, "Sum": {16, 32}},
		},
		{
			"digest footer", fieldBytes(t, DigestFooterSize, (*DigestFooter).Marshal, (*DigestFooter).Unmarshal),
			map[string][2]int{
				"Magic": {0, 8}, "Version": {8, 4}, "Algorithm": {12, 4}, "TableOff": {16, 8}, "Count": {24, 8},
				"MetaOff": {32, 8}, "ImageSize": {40, 8}, "Reserved": {48, 16}, "Table": {64, 32}, "Meta": {96, 32},
				"Root": {DigestRootOff, 32},
			},
		},
		{"daxfs super", fieldBytes(t, V8SuperSize, (*V8Super).Marshal, (*V8Super).Unmarshal), map[string][2]int{
			"Magic": {0, 4}, "Version": {4, 4}, "BlockSize": {8, 4}, "Reserved": {12, 4}, "TotalSize": {16, 8},
			"BaseOff": {24, 8}, "BaseSize": {32, 8}, "InodeOff": {40, 8}, "InodeCount": {48, 4}, "RootIno": {52, 4},
			"DataOff": {56, 8}, "OverlayOff": {64, 8}, "OverlaySize": {72, 8}, "OverlayBkts": {80, 4},
			"OverlayShift": {84, 4}, "PCacheOff": {88, 8}, "PCacheSize": {96, 8}, "PCacheSlots": {104, 4},
			"PCacheHashSft": {108, 4},
		}},
		{"daxfs inode", fieldBytes(t, V8InodeSize, (*V8Inode).Marshal, (*V8Inode).Unmarshal), map[string][2]int{
			"Ino": {0, 4}, "Mode": {4, 4}, "UID": {8, 4}, "GID": {12, 4}, "Size": {16, 8}, "DataOff": {24, 8},
			"Nlink": {32, 4},
		}},
		{
			"daxfs dirent", fieldBytes(t, V8DirentName, (*V8Dirent).Marshal, (*V8Dirent).Unmarshal),
			map[string][2]int{"Ino": {0, 4}, "Mode": {4, 4}, "NameLen": {8, 2}},
		},
		{"daxfs overlay", fieldBytes(t, V8OverlayUsed, (*V8Overlay).Marshal, (*V8Overlay).Unmarshal), map[string][2]int{
			"Magic": {0, 4}, "Version": {4, 4}, "BucketOff": {8, 8}, "PoolOff": {16, 8}, "PoolSize": {24, 8},
			"PoolAlloc": {32, 8}, "NextIno": {40, 8}, "Free": {48, 24},
		}},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s:\ngot  %v\nwant %v", c.name, c.got, c.want)
		}
	}
}

// TestErofsInode pins the bytes of both inode sizes, which share one struct.
func TestErofsInode(t *testing.T) {
	le := binary.LittleEndian
	in := ErofsInode{
		Layout: ErofsLayoutInline, XattrCount: 0x0102, Mode: 0x81a4, Nlink: 0x0304, Size: 0x05060708,
		Union: 0x090a0b0c, Ino: 0x0d0e0f10, UID: 0x1112, GID: 0x1314,
	}
	want := make([]byte, ErofsCompactSize)
	le.PutUint16(want[0:], 4)
	le.PutUint16(want[2:], 0x0102)
	le.PutUint16(want[4:], 0x81a4)
	le.PutUint16(want[6:], 0x0304)
	le.PutUint32(want[8:], 0x05060708)
	le.PutUint32(want[16:], 0x090a0b0c)
	le.PutUint32(want[20:], 0x0d0e0f10)
	le.PutUint16(want[24:], 0x1112)
	le.PutUint16(want[26:], 0x1314)
	checkInode(t, in, want, 4)

	in.Extended, in.UID, in.GID, in.Nlink, in.Size = true, 0x11121314, 0x15161718, 0x191a1b1c, 0x1d1e1f2021222324
	in.MtimeSec, in.MtimeNsec = -2, 0x25262728
	want = make([]byte, ErofsExtendedSize)
	le.PutUint16(want[0:], 5)
	le.PutUint16(want[2:], 0x0102)
	le.PutUint16(want[4:], 0x81a4)
	le.PutUint64(want[8:], 0x1d1e1f2021222324)
	le.PutUint32(want[16:], 0x090a0b0c)
	le.PutUint32(want[20:], 0x0d0e0f10)
	le.PutUint32(want[24:], 0x11121314)
	le.PutUint32(want[28:], 0x15161718)
	le.PutUint64(want[32:], 1<<64-2)
	le.PutUint32(want[40:], 0x25262728)
	le.PutUint32(want[44:], 0x191a1b1c)
	checkInode(t, in, want, 5)
}

func checkInode(t *testing.T, in ErofsInode, want []byte, format uint16) {
	t.Helper()
	got := bytes.Repeat([]byte{0xff}, len(want)) // every byte must be written
	in.Marshal(got)
	if !bytes.Equal(got, want) || in.HeaderSize() != len(want) || ErofsInodeExtended(got) != in.Extended {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	var back ErofsInode
	back.Unmarshal(got)
	in.Format = format
	if back != in {
		t.Errorf("wrote %+v, read %+v", in, back)
	}
}

// TestErofsChecksum uses block 0 of an image of an empty directory by mkfs.erofs 1.5 -T0 with a zero UUID.
func TestErofsChecksum(t *testing.T) {
	ref, err := hex.DecodeString("" +
		"e2e1f5e077641ef1030000000c0024000100000000000000000000000000000000000000010000000000000000000000" +
		"000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000" +
		"000000000000000000000000000000000000000000000000000000000000000004000000ed4102001b00000000000000" +
		"ffffffff0000000000000000000000002400000000000000180002002400000000000000190002002e2e2e")
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	copy(b[ErofsSuperOff:], ref)
	var s ErofsSuper
	s.Unmarshal(b[ErofsSuperOff:])
	if got := ErofsChecksum(b); got != s.Checksum || s.Magic != ErofsMagic {
		t.Errorf("checksum %#x, the reference tool says %#x", got, s.Checksum)
	}
	zero := ErofsChecksum(b)
	s.Checksum = 0xdeadbeef
	s.Marshal(b[ErofsSuperOff:])
	if got := ErofsChecksum(b); got != zero {
		t.Errorf("the checksum field counts: %#x and %#x", got, zero)
	}
	b[4095] = 1
	if ErofsChecksum(b) == zero {
		t.Error("the last byte of the block does not count")
	}
	b[4095], b[1023] = 0, 1
	if ErofsChecksum(b) != zero {
		t.Error("bytes before the superblock count")
	}
}

func TestErofsDev(t *testing.T) {
	for _, c := range [][3]uint32{{0, 0, 0}, {1, 3, 0x103}, {0xfff, 0xfffff, 0xffffffff}, {8, 0x12345, 0x12300845}} {
		if got := ErofsEncodeDev(c[0], c[1]); got != c[2] {
			t.Errorf("%d:%d: got %#x, want %#x", c[0], c[1], got, c[2])
		}
		if major, minor := ErofsDecodeDev(c[2]); major != c[0] || minor != c[1] {
			t.Errorf("%#x: got %d:%d, want %d:%d", c[2], major, minor, c[0], c[1])
		}
	}
}

func TestXattrSizes(t *testing.T) {
	if ErofsXattrBytes(0) != 0 || ErofsXattrBytes(1) != 12 || ErofsXattrBytes(3) != 20 {
		t.Error("xattr area sizes differ from 0, 12, 20")
	}
	for _, c := range [][3]int{{0, 0, 4}, {1, 0, 8}, {4, 4, 12}, {3, 65535, 65544}} {
		e := ErofsXattrEntry{NameLen: uint8(c[0]), ValueLen: uint16(c[1])}
		if e.Size() != c[2] {
			t.Errorf("name %d, value %d: %d bytes, want %d", c[0], c[1], e.Size(), c[2])
		}
	}
	for index, want := range map[uint8]string{
		0: "", 1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.",
		5: "", 6: "security.",
	} {
		if got := ErofsXattrPrefix(index); got != want {
			t.Errorf("prefix %d is %q, want %q", index, got, want)
		}
	}
	b := make([]byte, 4)
	PutErofsXattrID(b, 0x01020304)
	if ErofsXattrID(b) != 0x01020304 || b[0] != 4 {
		t.Errorf("xattr id bytes %x", b)
	}
}
