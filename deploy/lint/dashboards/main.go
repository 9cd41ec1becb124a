// Command dashboards judges Grafana dashboards by Grafana's own model: what it does not know, and what has the wrong type, is
// an error. Grafana itself would drop the one and show an empty panel for the other.
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
	// The models of the panels and of the queries that the dashboard's own leaves open.
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
	// It answers with a list, which is not nil when it is empty.
	var faults cog.BuildErrors
	err = model.UnmarshalJSONStrict(text)
	if err != nil && !(errors.As(err, &faults) && len(faults) == 0) {
		return err
	}
	return model.Validate()
}
