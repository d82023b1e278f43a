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
	// maxAttempts bounds how often the same thing is asked for in a row without success.
	maxAttempts = 6
	// maxWait bounds the sum of the waits between these attempts.
	maxWait = 2 * time.Minute
	// firstWait is the longest wait behind the first attempt; each further one is twice as long.
	firstWait = time.Second
)

// budget is what was spent on something that does not succeed.
type budget struct {
	failures int
	waited   time.Duration
}

// pause is how long to wait behind the failures so far. Half of it is random, so that clients that failed together do
// not come back together.
func (b *budget) pause() time.Duration {
	d := firstWait << (b.failures - 1)
	return d/2 + rand.N(d/2)
}

// try calls do for the hosts, one after the other, until one succeeds; and again, after a while, for those that failed
// in a way that may pass.
func (r *Repository) try(
	ctx context.Context, what string, hosts []*endpoint, b *budget, do func(context.Context, *endpoint) error,
) error {
	failed := make([]error, len(hosts))
	due := make([]time.Duration, len(hosts)) // when to ask a host again, on the clock of b; negative: never
	for i := range due {
		due[i] = b.waited
	}
	for {
		b.failures++ // taken back on success
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

// wait sleeps until the clock of b shows until, and says why.
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

// isTransient tells whether the same request may be answered otherwise a little later.
func isTransient(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// lost are the errors of a connection that came to an end, or did not come about.
var lost = []error{
	io.EOF, io.ErrUnexpectedEOF, errStalled, net.ErrClosed, syscall.ECONNRESET, syscall.ECONNREFUSED,
	syscall.ECONNABORTED, syscall.EPIPE, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.ETIMEDOUT,
}

// transient tells whether what failed with err may succeed a little later, and what the registry said about when. The
// list is of what passes: certificates, wrong lengths, pages in the place of blobs and whatever else comes do not.
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
	// This is what net/http says, and no type of it, if the connection ends in the head of an answer.
	return 0, strings.Contains(err.Error(), "transport connection broken")
}

// retryAfter reads the header of that name: seconds, or a date. It returns 0 if there is none that can be read, or it
// is over.
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
