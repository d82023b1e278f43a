package config

import (
	"fmt"
	"strings"
)

// Partial configures pulling layers file by file when the pool already has some of the files.
type Partial struct {
	Enabled bool `toml:"enabled"`
	// Exclude are registries left to containerd, as in references: "registry.example.com:5000".
	Exclude []string `toml:"exclude"`
	// Requests is the number of concurrent requests for one layer.
	Requests int `toml:"requests"`
	// AnswerTimeout bounds the time to fetch a layer's tables, LayerTimeout the time to fetch the whole layer.
	AnswerTimeout Duration `toml:"answer_timeout"`
	LayerTimeout  Duration `toml:"layer_timeout"`
}

func (p *Partial) validate() []error {
	var errs []error
	bad := func(key string, format string, args ...any) {
		errs = append(errs, fmt.Errorf("key %q: "+format, append([]any{key}, args...)...))
	}
	for _, r := range p.Exclude {
		if r == "" || strings.ContainsAny(r, "/ ") {
			bad("partial.exclude", "%q is not a registry, such as %q", r, "registry.example.com:5000")
		}
	}
	if p.Requests < 1 || p.Requests > 8 {
		bad("partial.requests", "%d is not in 1 to 8", p.Requests)
	}
	if p.AnswerTimeout <= 0 {
		bad("partial.answer_timeout", "is not positive")
	}
	if p.LayerTimeout <= 0 {
		bad("partial.layer_timeout", "is not positive")
	}
	return errs
}
