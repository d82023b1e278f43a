package daemon

import "github.com/prometheus/client_golang/prometheus"

// Metrics of the readers of the pool.
var (
	readerInfo = prometheus.NewDesc("daxfs_readers_info",
		"How images are kept for others that read the pool; its value is 1.", []string{"mode"}, nil)
	readerClaims = prometheus.NewDesc("daxfs_reader_claims",
		"Claims of a reader to images of the pool: "+
			"of now, of before its last boot, and torn ones, which hold all images.",
		[]string{"reader", "region", "state"}, nil)
	leasesFailed = prometheus.NewDesc("daxfs_leases_failed",
		"1 if a lease region cannot be read, because of which nothing is freed that a reader may use.", nil, nil)
	unlistedCount = prometheus.NewDesc("daxfs_images_unlisted",
		"Images that were removed and that stay until no reader uses them.", nil, nil)
)

// Metrics of pools of other owners, by their name in the configuration.
var (
	sharedUp = prometheus.NewDesc("daxfs_shared_pool_up",
		"1 if the pool of another owner can be used.", []string{"pool"}, nil)
	sharedGeneration = prometheus.NewDesc("daxfs_shared_pool_generation",
		"The generation of the pool that was read last; 0 if it cannot be read.", []string{"pool"}, nil)
	sharedCount = prometheus.NewDesc("daxfs_shared_pool_images",
		"Images of the pool that are listed in it, claimed here, and mounted here.", []string{"pool", "state"}, nil)
	sharedLeased = prometheus.NewDesc("daxfs_shared_pool_leased",
		"1 if the owner of the pool learns what is in use here.", []string{"pool"}, nil)
)

func describeShared(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		readerInfo, readerClaims, leasesFailed, unlistedCount, sharedUp, sharedGeneration, sharedCount, sharedLeased,
	} {
		ch <- d
	}
}

// collectShared collects the readers of the pool, and the state of the pools of other owners.
func collectShared(d *Daemon, gauge func(d *prometheus.Desc, v float64, labels ...string)) {
	r := d.readers()
	gauge(readerInfo, 1, r.Mode)
	gauge(leasesFailed, boolGauge(r.Error != ""))
	seen := map[string]bool{}
	for _, u := range r.List {
		region := labelValue(u.Region)
		if seen[region] { // configured twice, for instance a directory and a file in it
			continue
		}
		seen[region] = true
		for state, n := range map[string]int{"now": len(u.Images), "earlier": len(u.Earlier), "torn": u.Torn} {
			gauge(readerClaims, float64(n), labelValue(u.Reader), region, state)
		}
	}
	n := 0
	for _, m := range d.store.Pool().Images() {
		if d.store.Pool().Unlisted(m.Key) {
			n++
		}
	}
	gauge(unlistedCount, float64(n))
	for _, p := range d.sharedStatus() {
		name := labelValue(p.Name)
		gauge(sharedUp, boolGauge(p.Error == ""), name)
		gauge(sharedGeneration, float64(p.Generation), name)
		gauge(sharedLeased, boolGauge(p.Leased), name)
		for state, n := range map[string]int{"listed": p.Images, "claimed": p.Claimed, "mounted": p.Mounted} {
			gauge(sharedCount, float64(n), name, state)
		}
	}
}

// boolGauge returns 1 for true and 0 for false.
func boolGauge(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
