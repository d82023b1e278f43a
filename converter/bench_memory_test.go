package converter_test

import "runtime/metrics"

// inUse is the memory that the heap's objects occupy, dead ones that were not collected yet included.
func inUse() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
