package chunked

// Files are cut at places that depend on their contents, so that two versions of a large file share
// most chunks, wherever bytes were added. Chunks of containers/storage have 64 KiB. Larger ones
// compress better, and leave most files whole.
const (
	minChunk  = 512 << 10
	maxChunk  = 4 << 20
	cutBits   = 20 // on average one cut per MiB behind minChunk
	cutMask   = (1<<cutBits - 1) << (64 - cutBits)
	readBlock = 256 << 10 // bytes per read
)

// gear maps each byte to a number. The numbers determine the cuts and thus the output: they must not
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

// cutter finds the end of one chunk in data that arrives in parts.
type cutter struct {
	sum uint64 // of the last 64 bytes
	at  int    // bytes already examined
}

// find returns how many bytes of data belong to the chunk, and whether the chunk ends there. data
// holds all bytes of the chunk so far.
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
