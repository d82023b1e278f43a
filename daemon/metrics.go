package daemon

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// metrics is what the daemon counts. Its names begin with "daxfs_".
type metrics struct {
	d         *Daemon
	registry  *prometheus.Registry
	phases    *prometheus.HistogramVec
	failures  *prometheus.CounterVec
	fallbacks *prometheus.CounterVec
	scrubbed  prometheus.Counter
}

func newMetrics(d *Daemon) *metrics {
	m := &metrics{
		d:        d,
		registry: prometheus.NewRegistry(),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "daxfs_phase_seconds", Help: "Time that a phase took: ingest, stream, build, prepare or sweep.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}, []string{"phase"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_phase_failures_total", Help: "Phases that ended with an error.",
		}, []string{"phase"}),
		fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "daxfs_fallbacks_total", Help: "Times that plain directories were used in place of a shared image.",
		}, []string{"reason"}),
		scrubbed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "daxfs_scrub_bytes_total", Help: "Bytes of contents that were held against their digests.",
		}),
	}
	m.registry.MustRegister(m.phases, m.failures, m.fallbacks, m.scrubbed, (*gauges)(m),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) observe(phase string, took time.Duration, err error) {
	m.phases.WithLabelValues(phase).Observe(took.Seconds())
	if err != nil {
		m.failures.WithLabelValues(phase).Inc()
	}
}

func (m *metrics) fallback(reason string) { m.fallbacks.WithLabelValues(reason).Inc() }

// gauges collects what is in the pool when it is asked.
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
	layers = prometheus.NewDesc("daxfs_layers", "Layers in the pool.", nil, nil)
	images = prometheus.NewDesc("daxfs_images", "Images in the pool.", nil, nil)
	mounts = prometheus.NewDesc("daxfs_mounts", "Mounted images by driver.", []string{"driver"}, nil)
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		poolBytes, poolSize, savedBytes, deadCount, damagedCount, slotCount, epoch, layers, images, mounts,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	p := g.d.store.Pool()
	u := p.Usage()
	for kind, n := range map[string]int64{
		"head": u.Head, "tree": u.Tree, "segments": u.Segments, "meta_free": u.MetaFree, "extents": u.Extents,
		"dead": u.Dead, "free": u.Free,
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
	drivers := map[string]int{}
	for _, m := range g.d.store.Mounted() {
		drivers[m.Driver]++
	}
	for driver, n := range drivers {
		gauge(mounts, float64(n), driver)
	}
}

// serve answers HTTP on the configured address, if there is one, until stop is called.
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
