//go:build race

package converter_test

// raceDetector tells that the race detector is on, whose own memory counts as the program's.
const raceDetector = true
