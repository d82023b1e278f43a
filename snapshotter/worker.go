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

// worker stores committed directories and builds images before the first container needs them. Nothing
// depends on it: an operation that needs an image which is not built yet builds it.
type worker struct {
	s      *Snapshotter
	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond // signals changes of queue, running and stopped
	queue   []task
	running int
	stopped bool
}

// task is a committed snapshot to process, or a cleanup without a name. started: a container was prepared.
type task struct {
	name    string
	started bool
}

func newWorker(s *Snapshotter) *worker {
	w := &worker{s: s}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.changed = sync.NewCond(&w.mu)
	for range s.opts.Workers {
		w.done.Go(w.run)
	}
	return w
}

// stop cancels the work under way and waits for its end. The next process finds the rest of the queue again.
func (w *worker) stop() {
	w.cancel()
	w.mu.Lock()
	w.stopped = true
	w.changed.Broadcast()
	w.mu.Unlock()
	w.done.Wait()
}

func (w *worker) committed(name string) { w.add(task{name: name}) }

func (w *worker) add(t task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	w.queue = append(w.queue, t)
	w.changed.Broadcast()
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

// flush waits until the queue is empty and nothing runs.
func (w *worker) flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changed.Broadcast()
	})()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.stopped && len(w.queue)+w.running > 0 {
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

// process does the work that can be done ahead of time for a committed snapshot.
func (s *Snapshotter) process(ctx context.Context, t task) error {
	if t.name == "" {
		return s.Cleanup(ctx)
	}
	var links []link
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		links, err = chain(ctx, tx, t.name)
		return err
	})
	if err != nil {
		return ignoreGone(err)
	}
	top := links[0]
	if top.rec.Shared != "" || mixed(links) {
		return nil // its image is never in a pool of ours
	}
	if err := s.ingest(ctx, top); err != nil {
		return s.unlessGone(ctx, t.name, err)
	}
	if top.rec.Built || !top.rec.Top && !t.started {
		return nil
	}
	if _, err := s.image(ctx, links); err != nil {
		return s.unlessGone(ctx, t.name, err)
	}
	if err := s.amend(ctx, top.id, func(r *record) { r.Top, r.Built = true, true }); err != nil {
		return err
	}
	return s.dropDirs(ctx)
}

// ingest hands an unpacked committed snapshot to Lowers, once.
func (s *Snapshotter) ingest(ctx context.Context, l link) (err error) {
	if (!l.rec.Dir || l.rec.Ingested) && l.rec.Claim == nil {
		return nil
	}
	began := time.Now()
	defer func() { s.opts.Observe("ingest", time.Since(began), err) }()
	links, release, err := s.hold(ctx, []link{l})
	if err != nil {
		return err
	}
	defer release()
	l = links[0]
	if l.rec.Claim != nil {
		return s.prove(ctx, l)
	}
	ns, _ := splitName(l.info.Name)
	err = s.withEviction(ctx, func() error { return s.lowers.AddDir(ctx, ns, s.dirKey(l.id), s.upper(l.id)) })
	if err != nil {
		return err
	}
	return s.amend(ctx, l.id, func(r *record) { r.Ingested = true })
}

// prove restores the layer of a snapshot from the blob that the snapshot claims. Precondition: the layer is held.
func (s *Snapshotter) prove(ctx context.Context, l link) error {
	if l.rec.Claim == nil {
		return nil
	}
	var added Streamed
	err := s.withEviction(ctx, func() (err error) {
		added, err = s.lowers.AddClaimed(ctx, *l.rec.Claim)
		return err
	})
	if err != nil {
		return fmt.Errorf("snapshot %q was unpacked where its layer was expected to be streamed, and has to be "+
			"restored from its blob: %w", l.info.Name, err)
	}
	if added.Key != l.rec.Streamed[0] {
		return fmt.Errorf("snapshot %q: restored layer %q, expected %q: %w", l.info.Name, added.Key, l.rec.Streamed[0],
			errdefs.ErrDataLoss)
	}
	return s.amend(ctx, l.id, func(r *record) { r.Claim, r.StreamedUsage = nil, added.Usage })
}

// amend changes the record of a snapshot, if it still has one.
func (s *Snapshotter) amend(ctx context.Context, id string, change func(*record)) error {
	return s.st.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		if own(tx, bucketRecords).Get([]byte(id)) == nil {
			s.work.add(task{}) // the work for it is useless, and an earlier cleanup spared it
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

// recover forgets the unfinished work of a crashed process and queues the work that it interrupted.
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
			if err == nil && (rec.Dir && !rec.Ingested || rec.Top && !rec.Built || rec.Claim != nil) {
				names = append(names, info.Name)
			}
			return err
		})
	})
	for _, name := range names {
		s.work.committed(name)
	}
	if err := s.reclaim(ctx); err != nil {
		return err
	}
	// Remove directories without a record and other leftovers, but not now: this can take longer than a
	// service manager waits for a start. containerd calls Cleanup only after it removed something.
	s.work.add(task{})
	return err
}
