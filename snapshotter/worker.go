package snapshotter

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// worker stores committed directories and builds images ahead of the first container. Nothing depends on it: whoever
// needs an image before it is built builds it.
type worker struct {
	s      *Snapshotter
	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond // queue, waiting, running or stopped changed
	queue   []task
	waiting map[string]*time.Timer // snapshots that may turn out to be tops
	running int
	stopped bool
}

// task is one committed snapshot to look at. With settled set it had its time to get a layer on top. Without a name it is
// a cleanup.
type task struct {
	name    string
	settled bool
}

func newWorker(s *Snapshotter) *worker {
	w := &worker{s: s, waiting: map[string]*time.Timer{}}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.changed = sync.NewCond(&w.mu)
	for range s.opts.Workers {
		w.done.Go(w.run)
	}
	return w
}

// stop ends the work under way and returns when it has ended. What is left is found again by the next process.
func (w *worker) stop() {
	w.cancel()
	w.mu.Lock()
	w.stopped = true
	for _, t := range w.waiting {
		t.Stop()
	}
	w.changed.Broadcast()
	w.mu.Unlock()
	w.done.Wait()
}

// committed hands a committed snapshot to the worker.
func (w *worker) committed(name string) { w.add(task{name: name}) }

func (w *worker) add(t task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	if t.settled {
		delete(w.waiting, t.name)
	}
	w.queue = append(w.queue, t)
	w.changed.Broadcast()
}

// settle looks at a snapshot again after it had time to get a layer on top.
func (w *worker) settle(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped || w.waiting[name] != nil {
		return
	}
	w.waiting[name] = time.AfterFunc(w.s.opts.Settle, func() { w.add(task{name: name, settled: true}) })
}

// detach runs fn in a goroutine of its own, with a context that ends only with the worker.
func (w *worker) detach(fn func(context.Context)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return fmt.Errorf("the snapshotter is closing: %w", errdefs.ErrUnavailable)
	}
	w.done.Go(func() { fn(w.ctx) })
	return nil
}

// flush returns when nothing is left to do.
func (w *worker) flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changed.Broadcast()
	})()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.stopped && len(w.queue)+len(w.waiting)+w.running > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		w.changed.Wait()
	}
	return nil
}

func (w *worker) run() {
	for {
		w.mu.Lock()
		for len(w.queue) == 0 && !w.stopped {
			w.changed.Wait()
		}
		if w.stopped {
			w.mu.Unlock()
			return
		}
		t := w.queue[0]
		w.queue = w.queue[1:]
		w.running++
		w.mu.Unlock()

		ctx := log.WithLogger(w.ctx, log.L.WithField("snapshot", t.name))
		if err := w.s.process(ctx, t); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("work in the background failed, it is done again when it is needed")
		}

		w.mu.Lock()
		w.running--
		w.changed.Broadcast()
		w.mu.Unlock()
	}
}

// Flush waits until the background work on everything committed so far is done.
func (s *Snapshotter) Flush(ctx context.Context) error { return s.work.flush(ctx) }

// process does what can be done ahead of time for a committed snapshot.
func (s *Snapshotter) process(ctx context.Context, t task) error {
	if t.name == "" {
		return s.Cleanup(ctx)
	}
	var links []link
	hasChild := false
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if links, err = chain(ctx, tx, t.name); err != nil {
			return err
		}
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			hasChild = hasChild || info.Parent == t.name && info.Kind != snapshots.KindView
			return nil
		})
	})
	if err != nil {
		return ignoreGone(err)
	}
	top := links[0]
	if err := s.ingest(ctx, top); err != nil {
		return s.unlessGone(ctx, t.name, err)
	}
	if top.rec.Built {
		return nil
	}
	switch pos := positionOf(top.info.Labels); {
	case pos == positionInner:
		return nil
	case pos == positionUnknown && !t.settled:
		s.work.settle(t.name)
		return nil
	case pos == positionUnknown && hasChild:
		return nil
	}
	if _, err := s.image(ctx, links); err != nil {
		return s.unlessGone(ctx, t.name, err)
	}
	return s.amend(ctx, top.id, func(r *record) { r.Top, r.Built = true, true })
}

// ingest hands the directory of a committed snapshot to Lowers, the first time.
func (s *Snapshotter) ingest(ctx context.Context, l link) (err error) {
	if !l.rec.Dir || l.rec.Ingested {
		return nil
	}
	began := time.Now()
	defer func() { s.opts.Observe("ingest", time.Since(began), err) }()
	key := s.dirKey(l.id)
	release, err := s.hold(ctx, l, []Layer{{Key: key}})
	if err != nil {
		return err
	}
	defer release()
	if err := s.withEviction(ctx, func() error { return s.lowers.AddDir(ctx, key, s.upper(l.id)) }); err != nil {
		return err
	}
	return s.amend(ctx, l.id, func(r *record) { r.Ingested = true })
}

// amend changes the record of a snapshot, if it still has one.
func (s *Snapshotter) amend(ctx context.Context, id string, change func(*record)) error {
	return s.st.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		if tx.Bucket(bucketOwn).Bucket(bucketRecords).Get([]byte(id)) == nil {
			s.work.add(task{}) // what was done for it is of no use, and a cleanup before this spared it
			return nil
		}
		rec, err := getRecord(tx, id)
		if err != nil {
			return err
		}
		change(&rec)
		return putRecord(tx, id, rec)
	})
}

// unlessGone returns err unless the snapshot was removed meanwhile, which explains any error.
func (s *Snapshotter) unlessGone(ctx context.Context, name string, err error) error {
	if _, serr := s.Stat(ctx, name); errdefs.IsNotFound(serr) {
		return nil
	}
	return err
}

func ignoreGone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// recover forgets what a crash left half done and takes up the work that it interrupted.
func (s *Snapshotter) recover(ctx context.Context) error {
	var names []string
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			rec, err := getRecord(tx, id)
			if err == nil && (rec.Dir && !rec.Ingested || rec.Top && !rec.Built) {
				names = append(names, info.Name)
			}
			return err
		})
	})
	for _, name := range names {
		s.work.committed(name)
	}
	// Directories without a record, and whatever else is left over. Not now: removing can take longer than a service
	// manager waits for a start. containerd calls Cleanup only after it removed something.
	s.work.add(task{})
	return err
}
