package tree

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// read parses the layers of a stack into new nodes.
func (s stack) read(t *testing.T) (layers []*layer.Layer) {
	t.Helper()
	for _, raw := range s.tars() {
		l, err := layer.FromTar(t.Context(), bytes.NewReader(raw), &treetest.Store{}, layer.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	return layers
}

// TestTake: Take and Apply give the same tree or the same error, for both sources of layers.
func TestTake(t *testing.T) {
	trees := 0
	for seed := range uint64(200) {
		g := generator{r: rand.New(rand.NewPCG(seed, 0))}
		s := g.stack()
		copied, taken := s.read(t), s.read(t)
		want, wantErr := Merge(copied)
		m := NewMerger()
		var err error
		for i, l := range taken {
			if err = m.Take(l); err != nil {
				break
			}
			if l.Len() > 0 {
				t.Fatalf("seed %d: layer %d still has changes", seed, i)
			}
		}
		if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Fatalf("seed %d: error %v, expected %v\n%s", seed, err, wantErr, s)
		}
		if err != nil {
			continue
		}
		trees++
		if !reflect.DeepEqual(m.Root(), want) {
			t.Fatalf("seed %d: trees differ\n%s", seed, s)
		}
	}
	if trees < 50 {
		t.Errorf("only %d stacks could be merged", trees)
	}
}
