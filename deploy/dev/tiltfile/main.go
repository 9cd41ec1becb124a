// Executes the Tiltfile as Tilt would, with stubs that accept the same arguments as Tilt's functions. Prints as JSON the plan
// that Tilt would make. What Tilt would refuse, or what could never work, is an error.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"

	"go.starlark.net/starlark"
	"go.starlark.net/syntax"
)

func main() {
	s := &session{}
	flag.StringVar(&s.context, "context", "kind-chat", "the kubeconfig's context")
	flag.StringVar(&s.namespace, "namespace", "default", "and its namespace")
	flag.StringVar(&s.subcommand, "subcommand", "up", "up or ci")
	flag.StringVar(&s.system, "system", "Linux", "what uname -s says")
	flag.StringVar(&s.helm, "helm", "helm", "the program helm")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: tiltfile [flags] TILTFILE [arguments after tilt's --]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	s.arguments = flag.Args()[1:]
	plan, err := s.load(flag.Arg(0))
	if err != nil {
		if evaluation, ok := err.(*starlark.EvalError); ok {
			err = fmt.Errorf("%s", evaluation.Backtrace())
		}
		fmt.Fprintln(os.Stderr, strings.TrimSpace(err.Error()))
		os.Exit(1)
	}
	output := json.NewEncoder(os.Stdout)
	output.SetIndent("", "  ")
	if err := output.Encode(plan); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// load runs the file at the top of its folder.
func (s *session) load(path string) (*plan, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	thread := &starlark.Thread{Name: "Tiltfile", Print: func(_ *starlark.Thread, text string) {
		fmt.Fprintln(os.Stderr, text)
	}}
	// Tilt's dialect: `if` at the top level is allowed, `while` is not.
	options := &syntax.FileOptions{Set: true, TopLevelControl: true, GlobalReassign: true}
	if _, err := starlark.ExecFileOptions(options, thread, path, source, s.builtins()); err != nil {
		if strings.Contains(err.Error(), "undefined: ") {
			err = fmt.Errorf("%w\nIf Tilt has it, give it a stand-in in deploy/dev/tiltfile/builtins.go", err)
		}
		return nil, err
	}
	return s.assemble()
}
