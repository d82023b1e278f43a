// Testprogram runs in the images that stand in for those of critest. Its first argument selects its role.
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func hello(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") }

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "pause":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
		<-end
		return nil
	case len(args) == 1 && args[0] == "uid":
		_, err := fmt.Printf("Effective uid: %d\n", os.Geteuid())
		return err
	case len(args) == 2 && args[0] == "master process": // critest looks for these words
		if err := os.WriteFile("/run/nginx.pid", []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
			return err
		}
		fmt.Println("httpd serves") // critest looks for this in a log
		return http.ListenAndServe(":"+args[1], http.HandlerFunc(hello))
	}
	return fmt.Errorf("arguments %q are not known", args)
}
