package chunked

// Files are cut where their contents say, so that two versions of a large file have most chunks in common, wherever
// bytes were added. A chunk has 64 KiB in containers/storage. Larger ones compress better, and most files are not cut.
const (
	minChunk  = 512 << 10
	maxChunk  = 4 << 20
	cutBits   = 20 // a cut about every MiB behind minChunk
	cutMask   = (1<<cutBits - 1) << (64 - cutBits)
	readBlock = 256 << 10 // what is read at a time
)

// gear gives each byte a number. The numbers decide where files are cut, and so belong to the output: they must not
// change without need.
var gear = func() (g [256]uint64) {
	x := uint64(0)
	for i := range g { // splitmix64
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		g[i] = z ^ z>>31
	}
	return g
}()

// cutter finds the end of one chunk in bytes that come in parts.
type cutter struct {
	sum uint64 // of the last 64 bytes
	at  int    // bytes that were looked at
}

// find returns how many bytes of data, which has all bytes of the chunk so far, belong to the chunk, and whether it ends
// there.
func (c *cutter) find(data []byte) (int, bool) {
	c.at = max(c.at, min(len(data), minChunk-64))
	sum := c.sum
	for i, b := range data[c.at:min(len(data), maxChunk)] {
		sum = sum<<1 + gear[b]
		if sum&cutMask == 0 && c.at+i+1 >= minChunk {
			return c.at + i + 1, true
		}
	}
	c.sum = sum
	c.at = min(len(data), maxChunk)
	return c.at, c.at == maxChunk
}
