package daemon

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/yaml"
)

const monitoring = "../docs/monitoring"

// metricLabels returns the labels of every metric of a daemon, by the metric's name in expressions.
func metricLabels(t *testing.T) map[string]string {
	t.Helper()
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		newMetrics(&Daemon{}, nil).registry.Describe(ch)
	}()
	// The library offers no other access to the parts of a Desc.
	form := regexp.MustCompile(`^Desc\{fqName: "([^"]*)".*constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)
	out := map[string]string{}
	for d := range ch {
		parts := form.FindStringSubmatch(d.String())
		if parts == nil {
			t.Fatalf("description %q of a metric", d)
		}
		var labels []string
		for label := range strings.SplitSeq(parts[2], ",") {
			name, _, _ := strings.Cut(label, "=")
			labels = append(labels, name)
		}
		name, all := parts[1], strings.Join(labels, ",")+","+parts[3]+","
		out[name] = all
		if name == "daxfs_phase_seconds" {
			delete(out, name)
			out[name+"_bucket"], out[name+"_count"], out[name+"_sum"] = all+"le,", all, all
		}
	}
	return out
}

// usedMetric matches a metric in an expression, with its matchers.
var usedMetric = regexp.MustCompile(`\b(daxfs_[a-z0-9_]+)(?:\{([^}]*)\})?`)

// checkExpr reports metrics and labels of an expression that the daemon does not have.
func checkExpr(t *testing.T, where, expr string, have map[string]string) {
	t.Helper()
	used := usedMetric.FindAllStringSubmatch(expr, -1)
	if len(used) == 0 {
		t.Errorf("%s: %q names no metric of the daemon", where, expr)
	}
	for _, u := range used {
		labels, ok := have[u[1]]
		if !ok {
			t.Errorf("%s: the daemon has no metric %s", where, u[1])
			continue
		}
		for _, m := range regexp.MustCompile(`([a-z]+)[=!]`).FindAllStringSubmatch(u[2], -1) {
			if m[1] != "instance" && !strings.Contains(","+labels, ","+m[1]+",") {
				t.Errorf("%s: metric %s has no label %q: it has %q", where, u[1], m[1], labels)
			}
		}
	}
}

// Alert rules and dashboard use only metrics and labels of the daemon, and promtool accepts the rules.
func TestMonitoring(t *testing.T) {
	have := metricLabels(t)
	if len(have) < 20 {
		t.Fatalf("the daemon has %d metrics", len(have))
	}
	file := filepath.Join(monitoring, "alerts.yml")
	raw, err := os.ReadFile(file)
	must(t, err)
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	must(t, yaml.UnmarshalStrict(raw, &rules))
	seen := map[string]bool{}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			checkExpr(t, r.Alert, r.Expr, have)
			if seen[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" ||
				r.Annotations["description"] == "" {
				t.Errorf("rule %q is there twice, or lacks something: %+v", r.Alert, r)
			}
			seen[r.Alert] = true
			for _, l := range regexp.MustCompile(`\$labels\.([a-z]+)`).FindAllStringSubmatch(r.Annotations["summary"],
				-1) {
				if metric := usedMetric.FindStringSubmatch(r.Expr)[1]; !strings.Contains(","+
					have[metric], ","+l[1]+",") {
					t.Errorf("%s: metric %s has no label %q for the summary", r.Alert, metric, l[1])
				}
			}
		}
	}
	if len(seen) < 10 {
		t.Errorf("%d rules", len(seen))
	}
	t.Run("promtool", func(t *testing.T) {
		tool := filepath.Join(os.Getenv("DAXFS_TEST_CACHE"), "tools/promtool")
		if _, err := os.Stat(tool); err != nil {
			if tool, err = exec.LookPath("promtool"); err != nil {
				t.Skip("promtool is not here; make test-deps gets it")
			}
		}
		if out, err := exec.CommandContext(t.Context(), tool, "check", "rules", file).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})

	raw, err = os.ReadFile(filepath.Join(monitoring, "grafana.json"))
	must(t, err)
	var dash struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Query string }
		}
	}
	must(t, json.Unmarshal(raw, &dash))
	ids := map[int]bool{}
	for _, p := range dash.Panels {
		if ids[p.ID] || len(p.Targets) == 0 {
			t.Errorf("panel %q has no number of its own or shows nothing", p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			checkExpr(t, p.Title, target.Expr, have)
		}
	}
	for _, v := range dash.Templating.List {
		if v.Name == "instance" {
			checkExpr(t, "variable instance", v.Query, have)
		}
	}
}
