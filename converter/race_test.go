//go:build race

package converter_test

// raceDetector is true if the race detector is on, whose memory counts as the program's.
const raceDetector = true
