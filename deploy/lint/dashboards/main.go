// Command dashboards checks Grafana dashboards against Grafana's own model. Unknown fields and wrong types are errors; Grafana
// itself would drop the former and show an empty panel for the latter.
//
//	dashboards FILE...
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func main() {
	// The models of panels and queries, which the dashboard's own model leaves open.
	plugins.RegisterDefaultPlugins()
	failed := len(os.Args) < 2
	for _, file := range os.Args[1:] {
		if err := check(file); err != nil {
			failed = true
			fmt.Fprintf(os.Stderr, "%s: %v\n", file, err)
		}
	}
	if failed {
		os.Exit(1)
	}
}

func check(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !json.Valid(text) {
		return errors.New("not JSON")
	}
	var model dashboard.Dashboard
	// It returns a list that is not nil even when it is empty.
	var faults cog.BuildErrors
	err = model.UnmarshalJSONStrict(text)
	if err != nil && !(errors.As(err, &faults) && len(faults) == 0) {
		return err
	}
	return model.Validate()
}
