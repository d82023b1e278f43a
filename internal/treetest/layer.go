package treetest

import "github.com/daxfs/daxfs-snapshotter/converter/layer"

// Changes returns the changes of a layer.
func Changes(l *layer.Layer) []layer.Change {
	var out []layer.Change
	for _, c := range l.All() {
		out = append(out, *c)
		c.Node = nil
	}
	return out
}

// LayerOf returns the layer of a tar that has these changes.
func LayerOf(changes ...layer.Change) *layer.Layer {
	l := &layer.Layer{}
	for _, c := range changes {
		l.Append(c)
	}
	return l
}
