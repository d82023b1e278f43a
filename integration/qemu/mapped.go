package qemu

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Mapped returns, in KiB, how much of a file is mapped and in the machine's memory, and its
// proportional part: memory that two machines map counts half for each.
func (r *Running) Mapped(path string) (rss, pss int64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", r.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	inside := false
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 0 && strings.Contains(fields[0], "-") {
			inside = strings.HasSuffix(lines.Text(), " "+path)
		}
		if !inside || len(fields) != 3 {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue // a line in another format
		}
		switch fields[0] {
		case "Rss:":
			rss += kib
		case "Pss:":
			pss += kib
		}
	}
	return rss, pss, lines.Err()
}
