package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// useLog makes log lines of the daemon's packages look like messages of a command. It drops those below warnings.
func (e *env) useLog() {
	log.L.Logger.SetOutput(e.stderr)
	log.L.Logger.SetLevel(logrus.WarnLevel)
	log.L.Logger.SetFormatter(plainFormatter{})
}

// plainFormatter writes "daxfs: warning: MESSAGE (FIELD VALUE, ...): ERROR".
type plainFormatter struct{}

func (plainFormatter) Format(entry *logrus.Entry) ([]byte, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "daxfs: %s: %s", entry.Level, entry.Message)
	var fields []string
	for _, key := range slices.Sorted(maps.Keys(entry.Data)) {
		if key != logrus.ErrorKey {
			fields = append(fields, fmt.Sprintf("%s %v", key, entry.Data[key]))
		}
	}
	if len(fields) > 0 {
		fmt.Fprintf(&b, " (%s)", strings.Join(fields, ", "))
	}
	if err, ok := entry.Data[logrus.ErrorKey]; ok {
		fmt.Fprintf(&b, ": %v", err)
	}
	return append([]byte(message(errors.New(b.String()))), '\n'), nil
}
