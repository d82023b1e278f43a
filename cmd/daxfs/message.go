package main

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// message formats an error for a terminal. It escapes control sequences and indents further lines,
// because errors contain names from images and answers from registries.
func message(err error) string {
	var b strings.Builder
	for s := err.Error(); s != ""; {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == '\n':
			b.WriteString("\n  ")
		case r == utf8.RuneError && n == 1 || !strconv.IsPrint(r):
			q := strconv.Quote(s[:n])
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}
