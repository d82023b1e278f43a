package chunked

import (
	"bytes"
	"encoding/binary"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// table collects and compresses its input.
type table struct {
	out bytes.Buffer
	raw int64 // uncompressed bytes
	z   *zstd.Encoder
}

// encoders pools encoders: their tables of about 10 MB are worth keeping.
var encoders = sync.Pool{New: func() any {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err) // an option is wrong
	}
	return z
}}

func newTable() *table {
	t := &table{z: encoders.Get().(*zstd.Encoder)}
	t.z.Reset(&t.out)
	return t
}

func (t *table) Write(p []byte) (int, error) {
	n, err := t.z.Write(p)
	t.raw += int64(n)
	return n, err
}

// Close ends the compressed data.
func (t *table) Close() error {
	defer encoders.Put(t.z)
	return t.z.Close()
}

func skippableHeader(n int) []byte {
	return binary.LittleEndian.AppendUint32([]byte(SkippableMagic), uint32(n))
}

func (f Footer) encode() []byte {
	b := make([]byte, 0, FooterSize)
	for _, n := range []int64{
		f.TOC.Offset, f.TOC.Length, f.TOC.Raw, f.Type, f.TarSplit.Offset, f.TarSplit.Length, f.TarSplit.Raw,
	} {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	return append(b, FooterMagic...)
}
