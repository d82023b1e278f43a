//go:build !race

package slow

// RaceDetector tells that the race detector is on, whose time and memory count as the program's.
const RaceDetector = false
