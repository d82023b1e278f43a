package daemon

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/version"
	"github.com/daxfs/daxfs-snapshotter/mount"
)

// metrics are the daemon's counters. Their names begin with "daxfs_".
type metrics struct {
	d         *Daemon
	registry  *prometheus.Registry
	phases    *prometheus.HistogramVec
	failures  *prometheus.CounterVec
	fallbacks *prometheus.CounterVec
	evictions *prometheus.CounterVec
	scrubbed  prometheus.Counter
	pulls     *prometheus.CounterVec
	pullBytes *prometheus.CounterVec
	ranges    prometheus.Counter
	drivers   []string // the usable ones
}

// newMetrics returns the metrics of a daemon with usable drivers. Every known label value starts with
// 0, because a rate over a counter that appears with its first event misses that event.
func newMetrics(d *Daemon, drivers []mount.Driver) *metrics {
	m := &metrics{
		d:        d,
		registry: prometheus.NewRegistry(),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "daxfs_phase_seconds", Help: "Time that a phase took: " + strings.Join(phases, ", ") + ".",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}, []string{"phase"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_phase_failures_total", Help: "Phases that ended with an error.",
		}, []string{"phase"}),
		fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_fallbacks_total", Help: "Times that plain directories were used in place of a shared image.",
		}, []string{"reason"}),
		evictions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_evictions_total",
			Help: "Images and layers that left the pool to make room although they are needed.",
		}, []string{"what"}),
		scrubbed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "daxfs_scrub_bytes_total", Help: "Bytes of contents that were held against their digests.",
		}),
		pulls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_partial_pulls_total", Help: "Layers that were pulled by their files, or tried to, by result.",
		}, []string{"result"}),
		pullBytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_partial_bytes_total",
			Help: "Bytes of such layers: fetched ones as the registry sent them, and contents that the pool had.",
		}, []string{"from"}),
		ranges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "daxfs_partial_ranges_total", Help: "Byte ranges of blobs that registries were asked for.",
		}),
	}
	for _, drv := range drivers {
		m.drivers = append(m.drivers, drv.Name())
	}
	for _, phase := range phases {
		m.phases.WithLabelValues(phase)
		m.failures.WithLabelValues(phase)
	}
	for _, reason := range []string{"full", "error"} {
		m.fallbacks.WithLabelValues(reason)
	}
	for _, what := range []string{"image", "layer"} {
		m.evictions.WithLabelValues(what)
	}
	for _, result := range []string{"pulled", "failed"} {
		m.pulls.WithLabelValues(result)
	}
	for _, from := range []string{"registry", "pool"} {
		m.pullBytes.WithLabelValues(from)
	}
	m.registry.MustRegister(m.phases, m.failures, m.fallbacks, m.evictions, m.scrubbed,
		m.pulls, m.pullBytes, m.ranges, buildInfo(), (*gauges)(m),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// phases are the values of the label phase.
var phases = []string{"ingest", "stream", "pull", "build", "plain", "prepare", "sweep"}

// buildInfo is always 1; its labels describe the build of the daemon.
func buildInfo() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "daxfs_build_info", Help: "The build of the daemon; its value is 1.",
		ConstLabels: prometheus.Labels{"version": version.String(), "goversion": runtime.Version()},
	}, func() float64 { return 1 })
}

func (m *metrics) observe(phase string, took time.Duration, err error) {
	m.phases.WithLabelValues(phase).Observe(took.Seconds())
	if err != nil {
		m.failures.WithLabelValues(phase).Inc()
	}
}

func (m *metrics) fallback(reason string) { m.fallbacks.WithLabelValues(reason).Inc() }

func (m *metrics) evicted(what string) { m.evictions.WithLabelValues(what).Inc() }

// pulled counts a layer that was pulled file by file, or an attempt that failed.
func (m *metrics) pulled(c *counts, err error) {
	m.ranges.Add(float64(c.ranges.Load()))
	m.pullBytes.WithLabelValues("registry").Add(float64(c.fetched.Load()))
	if err != nil {
		m.pulls.WithLabelValues("failed").Inc()
		return
	}
	m.pullBytes.WithLabelValues("pool").Add(float64(c.have))
	m.pulls.WithLabelValues("pulled").Inc()
}

// gauges reads the state of the pool at each collection.
type gauges metrics

var (
	poolBytes  = prometheus.NewDesc("daxfs_pool_bytes", "Bytes of the pool by what they hold.", []string{"kind"}, nil)
	poolSize   = prometheus.NewDesc("daxfs_pool_size_bytes", "Size of the pool.", nil, nil)
	savedBytes = prometheus.NewDesc("daxfs_pool_saved_bytes",
		"Bytes that images would take besides if each had its own contents.", nil, nil)
	deadCount = prometheus.NewDesc("daxfs_pool_dead_files",
		"Distinct contents that nothing holds and that wait until nobody can read them.", nil, nil)
	damagedCount = prometheus.NewDesc("daxfs_pool_damaged_files",
		"Distinct contents that have changed and that somebody may still read.", nil, nil)
	slotCount = prometheus.NewDesc("daxfs_pool_slots",
		"Places for images in this epoch, by state.", []string{"state"}, nil)
	epoch = prometheus.NewDesc("daxfs_pool_epoch_info",
		"The epoch of the pool; its value is 1.", []string{"uuid"}, nil)
	layers     = prometheus.NewDesc("daxfs_layers", "Layers in the pool.", nil, nil)
	images     = prometheus.NewDesc("daxfs_images", "Images in the pool.", nil, nil)
	imageBytes = prometheus.NewDesc("daxfs_image_bytes",
		"Contents of an image: its own, and those that it shares with other images.",
		[]string{"image", "name", "kind"}, nil)
	mounts = prometheus.NewDesc("daxfs_mounts", "Mounted images by driver.", []string{"driver"}, nil)
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		poolBytes, poolSize, savedBytes, deadCount, damagedCount, slotCount, epoch, layers, images, imageBytes, mounts,
	} {
		ch <- d
	}
	describeShared(ch)
}

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	p := g.d.store.Pool()
	u := p.Usage()
	// Room in the pool is useless if the disk below it is full.
	free := u.Free
	if room, err := g.d.store.Room(); err == nil {
		free = min(free, room.Free())
	}
	for kind, n := range map[string]int64{
		"head": u.Head, "tree": u.Tree, "segments": u.Segments, "meta_free": u.MetaFree, "extents": u.Extents,
		"dead": u.Dead, "free": free, "unbacked": u.Free - free,
	} {
		gauge(poolBytes, float64(n), kind)
	}
	gauge(poolSize, float64(u.Size))
	gauge(savedBytes, float64(u.Unshared-u.ImageExtents))
	gauge(deadCount, float64(u.DeadCount))
	gauge(damagedCount, float64(p.DamagedCount()))
	for state, n := range map[string]int{"used": u.SlotsUsed, "free": u.Slots - u.SlotsUsed} {
		gauge(slotCount, float64(n), state)
	}
	gauge(epoch, 1, fmt.Sprintf("%x", p.UUID()))
	gauge(layers, float64(u.Layers))
	gauge(images, float64(u.Images))
	for _, info := range g.d.store.Images() {
		u, err := p.ImageUsage(info.Key)
		if err != nil {
			continue // it was removed meanwhile
		}
		name := ""
		if len(info.Names) > 0 {
			name = labelValue(info.Names[0])
		}
		gauge(imageBytes, float64(u.Extents-u.Shared), info.Key, name, "own")
		gauge(imageBytes, float64(u.Shared), info.Key, name, "shared")
	}
	drivers := map[string]int{}
	for _, name := range g.drivers {
		drivers[name] = 0
	}
	for _, m := range g.d.store.Mounted() {
		drivers[m.Driver]++
	}
	for driver, n := range drivers {
		gauge(mounts, float64(n), driver)
	}
	collectShared(g.d, gauge)
}

// labelValue makes a text valid UTF-8, as the values of labels must be.
func labelValue(text string) string { return strings.ToValidUTF8(text, "\ufffd") }

// serve serves HTTP on the configured address, if any, until stop is called.
func (m *metrics) serve(ctx context.Context, c config.Metrics) (stop func(), err error) {
	if c.Address == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", c.Address)
	if err != nil {
		return nil, fmt.Errorf("metrics.address: %w", err)
	}
	srv := &http.Server{Handler: m.handler(c.Pprof), ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := srv.Serve(l); err != nil && err != http.ErrServerClosed {
			log.G(ctx).WithError(err).Error("metrics server ended")
		}
	}()
	log.G(ctx).WithField("address", l.Addr()).Info("serving metrics")
	if host, _, err := net.SplitHostPort(l.Addr().String()); err == nil && net.ParseIP(host).IsUnspecified() {
		log.G(ctx).WithField("address", c.Address).Warn("metrics are served on all interfaces, without a password; " +
			"metrics.address = \"127.0.0.1:PORT\" keeps them on this machine")
	}
	return func() { srv.Close() }, nil
}

func (m *metrics) handler(withPprof bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		if err := m.d.Healthy(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		if _, unused := m.d.sharedTrouble(); unused != nil {
			fmt.Fprintln(w, unused)
		}
	})
	if withPprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}
