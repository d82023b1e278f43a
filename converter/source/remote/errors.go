package remote

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

var (
	// ErrNotFound matches an *Error if all hosts answer that they do not have the content.
	ErrNotFound = errors.New("not found")

	errStalled   = errors.New("nothing came for a minute")
	errRedirects = errors.New("more than 10 redirects")
	errNoTLS     = errors.New("an address without https")
	errWebPage   = errors.New("it answers with a web page (text/html): is a login page or a proxy before the registry?")
)

// Error reports content that could not be fetched from a registry and its mirrors, with advice.
type Error struct {
	Registry   string // as in the reference
	Repository string
	What       string // "manifest TAG", "manifest DIGEST" or "blob DIGEST"
	Attempts   int
	Hosts      []error // the error of each host, in the order of hosts.toml
	hint       string
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%s: %s", e.Registry, e.Repository, e.What)
	sep := ": "
	for _, err := range e.Hosts {
		fmt.Fprintf(&b, "%s%v", sep, err)
		sep = "; "
	}
	var notes []string
	if e.Attempts > 1 {
		notes = append(notes, fmt.Sprintf("%d attempts", e.Attempts))
	}
	if e.hint != "" {
		notes = append(notes, e.hint)
	}
	if len(notes) > 0 {
		fmt.Fprintf(&b, " (%s)", strings.Join(notes, "; "))
	}
	return b.String()
}

// Unwrap returns the errors of the hosts.
func (e *Error) Unwrap() []error { return e.Hosts }

// Is makes errors.Is(e, ErrNotFound) true if all hosts answer so.
func (e *Error) Is(target error) bool {
	if target != ErrNotFound {
		return false
	}
	for _, err := range e.Hosts {
		if s, ok := errors.AsType[*statusError](err); !ok || s.token || s.code != http.StatusNotFound {
			return false
		}
	}
	return len(e.Hosts) > 0
}

func (r *Repository) failed(what string, hosts []*endpoint, errs []error, b *budget) error {
	e := &Error{Registry: r.domain, Repository: r.path, What: what, Attempts: b.failures}
	for i, err := range errs {
		if err != nil {
			e.Hosts = append(e.Hosts, err)
			e.hint = hint(hosts[i], what, err, b) // of the last one: the registry follows its mirrors
		}
	}
	return e
}

func hint(e *endpoint, what string, err error, b *budget) string {
	if s, ok := errors.AsType[*statusError](err); ok {
		switch {
		case isTransient(s.code) && s.after > maxWait-b.waited:
			return fmt.Sprintf("the registry wants to be asked again in %s, and we wait for %s at most: try again then",
				s.after.Round(time.Second), maxWait)
		case s.code == http.StatusUnauthorized || s.code == http.StatusForbidden:
			advice := "is the name right? if it is private: docker login " + e.name
			if none := e.auth.whyNone(); none != nil {
				advice += fmt.Sprintf("; credentials could not be read: %v", none)
			}
			return advice
		case s.code == http.StatusNotFound && s.token:
			return ""
		case s.code == http.StatusNotFound && strings.HasPrefix(what, "manifest"):
			return "is the name right?"
		case s.code == http.StatusNotFound:
			return "a part of the image is missing there: push the image again"
		case s.code == http.StatusTooManyRequests:
			return "too many requests were made: try again later, or with an account: docker login " + e.name
		case isTransient(s.code):
			return "the registry, or a proxy before it, is in trouble: try again later"
		}
		return ""
	}
	if errors.As(err, new(x509.UnknownAuthorityError)) {
		return fmt.Sprintf("to trust another certificate authority, name it as ca in the hosts.toml of %s", e.name)
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		return "the registry does not speak TLS: --plain-http"
	}
	if _, ok := transient(err); ok {
		return "does the registry run, and does the network in between work?"
	}
	return ""
}

// statusError is a response with an unexpected status.
type statusError struct {
	from   string // host that answered
	code   int
	after  time.Duration // from Retry-After
	detail string
	token  bool // the request was for a token
}

func (e *statusError) Error() string {
	msg := fmt.Sprintf("%s answers %d %s", e.from, e.code, http.StatusText(e.code))
	if e.detail != "" {
		msg += ": " + e.detail
	}
	return msg
}

const (
	maxErrorBody   = 16 << 10
	maxErrorDetail = 300
)

func statusOf(from string, resp *http.Response) *statusError {
	e := &statusError{from: from, code: resp.StatusCode, after: retryAfter(resp.Header, time.Now())}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	switch {
	case err != nil:
	case noWebPage(resp) != nil:
		e.detail = "a web page (text/html)"
	default:
		e.detail = detail(b)
	}
	return e
}

// detail extracts the error message of a registry: in the form of the distribution specification, or any text.
func detail(b []byte) string {
	text := string(b)
	var doc struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	if json.Unmarshal(b, &doc) == nil && len(doc.Errors) > 0 {
		var all []string
		for _, e := range doc.Errors {
			all = append(all, strings.Trim(e.Code+": "+e.Message, ": "))
		}
		text = strings.Join(all, "; ")
	}
	text = strings.ToValidUTF8(strings.Join(strings.Fields(text), " "), "\uFFFD")
	if r := []rune(text); len(r) > maxErrorDetail {
		text = string(r[:maxErrorDetail]) + "…"
	}
	return text
}

// withoutQuery removes the query from the address in an error: registries redirect to signed
// addresses, which grant access to anyone who has them.
func withoutQuery(err error) error {
	ue, ok := errors.AsType[*url.Error](err)
	if !ok {
		return err
	}
	u, parseErr := url.Parse(ue.URL)
	if parseErr != nil {
		return ue.Err
	}
	u.RawQuery, u.Fragment = "", ""
	return fmt.Errorf("%s: %w", u.Redacted(), ue.Err)
}
