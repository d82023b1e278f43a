//go:build !race

package converter_test

const raceDetector = false
