package region

// The kinds of region.
const (
	// KindFile is a sparse file on a disk filesystem. The page cache is the shared memory.
	KindFile = "file"
	// KindTmpfs is a sparse file on a tmpfs.
	KindTmpfs = "tmpfs"
	// KindHugetlbfs is a file of huge pages, all of them reserved when the region is opened.
	KindHugetlbfs = "hugetlbfs"
	// KindPmem is a persistent memory block device, /dev/pmemN.
	KindPmem = "pmem"
	// KindDevDAX is a DAX character device, /dev/daxX.Y.
	KindDevDAX = "devdax"
	// KindDMABuf is a buffer from a DMA heap, which lives as long as something refers to it.
	KindDMABuf = "dmabuf"
	// KindPhys is a reserved range of physical memory, mapped through /dev/mem.
	KindPhys = "phys"
)

// Traits are the properties that all regions of a kind share.
type Traits struct {
	// Regular says that the region is a sparse regular file: it can be created, moved, leased and grown.
	Regular bool
	// ByAddress says that other kernels and devices may reach the memory by its address. The memory
	// existed before it was opened, and others than this machine's root may have written to it.
	ByAddress bool
	// MapOnly says that the memory can only be mapped: no read(2), loop devices or filesystems.
	MapOnly bool
	// Volatile says that the region ends with the kernel at the latest.
	Volatile bool
}

// kind holds what the code asks about a kind of region before one is open. To add one, write its file
// in this package, add a row here, and name it in package config, which imports nothing.
type kind struct {
	name string
	open func(Config) (Region, error)
	Traits
}

// kinds returns all kinds, in the order of the documentation.
func kinds() []kind {
	onHost := func(open func(host, Config) (Region, error)) func(Config) (Region, error) {
		return func(c Config) (Region, error) { return open(thisHost, c) }
	}
	return []kind{
		{KindFile, openFile, Traits{Regular: true}},
		{KindTmpfs, openFile, Traits{Regular: true, Volatile: true}},
		{KindHugetlbfs, openHugetlbfs, Traits{MapOnly: true, Volatile: true}},
		{KindPmem, onHost(openPmem), Traits{ByAddress: true}},
		{KindDevDAX, onHost(openDevDAX), Traits{ByAddress: true, MapOnly: true}},
		{KindDMABuf, openDMABuf, Traits{ByAddress: true, MapOnly: true, Volatile: true}},
		{KindPhys, onHost(openPhys), Traits{ByAddress: true, MapOnly: true}},
	}
}

// Kinds lists all kinds in the order of the documentation.
func Kinds() (names []string) {
	for _, k := range kinds() {
		names = append(names, k.name)
	}
	return names
}

// TraitsOf returns the traits of a kind. An unknown kind has none.
func TraitsOf(name string) Traits {
	for _, k := range kinds() {
		if k.name == name {
			return k.Traits
		}
	}
	return Traits{}
}

// Traits returns the traits of the region's kind.
func (i Info) Traits() Traits { return TraitsOf(i.Kind) }
