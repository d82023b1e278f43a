package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
)

const (
	// maxAttempts bounds consecutive attempts without success.
	maxAttempts = 6
	// maxWait bounds the sum of the waits between these attempts.
	maxWait = 2 * time.Minute
	// firstWait is the longest wait after the first attempt; each later one is twice as long.
	firstWait = time.Second
)

// budget counts the failures and waits of a request.
type budget struct {
	failures int
	waited   time.Duration
}

// pause returns the wait after the failures so far. Half of it is random, so that clients that failed
// together do not return together.
func (b *budget) pause() time.Duration {
	d := firstWait << (b.failures - 1)
	return d/2 + rand.N(d/2)
}

// try calls do for the hosts in order until one succeeds. After a wait it repeats this for hosts with
// a transient error.
func (r *Repository) try(
	ctx context.Context, what string, hosts []*endpoint, b *budget, do func(context.Context, *endpoint) error,
) error {
	failed := make([]error, len(hosts))
	due := make([]time.Duration, len(hosts)) // when to ask a host again, on the clock of b; negative: never
	for i := range due {
		due[i] = b.waited
	}
	for {
		b.failures++ // undone on success
		for i, e := range hosts {
			if due[i] < 0 || due[i] > b.waited {
				continue
			}
			err := do(ctx, e)
			if err == nil {
				b.failures--
				return nil
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			failed[i], due[i] = err, -1
			if after, ok := transient(err); ok {
				due[i] = b.waited + max(after, b.pause())
			}
		}
		next, again := time.Duration(math.MaxInt64), -1
		for i, d := range due {
			if d >= 0 && d < next {
				next, again = d, i
			}
		}
		if again < 0 || b.failures >= maxAttempts || next > maxWait {
			return r.failed(what, hosts, failed, b)
		}
		if err := r.wait(ctx, what, failed[again], b, next); err != nil {
			return err
		}
	}
}

// wait sleeps until the clock of b shows until, and reports why.
func (r *Repository) wait(ctx context.Context, what string, why error, b *budget, until time.Duration) error {
	d := until - b.waited
	message := fmt.Sprintf("%s/%s: %s: %v; attempt %d of %d follows in %s",
		r.domain, r.path, what, why, b.failures+1, maxAttempts, d.Round(time.Millisecond))
	if r.conf.Notify != nil {
		r.conf.Notify(message)
	} else {
		log.G(ctx).Info(message)
	}
	b.waited = until
	return r.pace.sleep(ctx, d)
}

// isTransient reports whether the same request may succeed a little later.
func isTransient(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// lost are the errors of a connection that ended or could not be made.
var lost = []error{
	io.EOF, io.ErrUnexpectedEOF, errStalled, net.ErrClosed, syscall.ECONNRESET, syscall.ECONNREFUSED,
	syscall.ECONNABORTED, syscall.EPIPE, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.ETIMEDOUT,
}

// transient reports whether a request that failed with err may succeed a little later, and the wait that the
// registry asks for. Other errors (certificates, wrong lengths, pages in place of blobs) are permanent.
func transient(err error) (after time.Duration, ok bool) {
	if s, ok := errors.AsType[*statusError](err); ok {
		return s.after, isTransient(s.code)
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return 0, false
	}
	for _, l := range lost {
		if errors.Is(err, l) {
			return 0, true
		}
	}
	if n, ok := errors.AsType[net.Error](err); ok {
		return 0, n.Timeout()
	}
	// net/http has only this text, not a type, for a connection that ends in the header of a response.
	return 0, strings.Contains(err.Error(), "transport connection broken")
}

// retryAfter returns the wait in the header Retry-After, in seconds or as a date. It returns 0 if the
// header is missing, unreadable or in the past.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(v, 10, 64); err == nil {
		return time.Duration(min(seconds, uint64(math.MaxInt64/4/time.Second))) * time.Second
	}
	at, err := http.ParseTime(v)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date // clocks differ
	}
	return max(0, at.Sub(now))
}
