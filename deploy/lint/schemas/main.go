// Command schemas writes the JSON schemas for kubeconform from the API server's own sources: its OpenAPI document (a .json
// file) and custom resource definitions (.yaml files).
//
//	schemas DIR FILE...
//
// Each kind becomes one self-contained DIR/GROUP/VERSION/KIND.json. The core group is named v1, as in kubeconform.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

type object = map[string]any

func main() {
	if len(os.Args) < 3 {
		fail(fmt.Errorf("usage: schemas DIR FILE..."))
	}
	for _, file := range os.Args[2:] {
		text, err := os.ReadFile(file)
		if err == nil && filepath.Ext(file) == ".json" {
			err = fromOpenAPI(os.Args[1], text)
		} else if err == nil {
			err = fromDefinitions(os.Args[1], text)
		}
		if err != nil {
			fail(fmt.Errorf("%s: %w", file, err))
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "schemas:", err)
	os.Exit(1)
}

// fromOpenAPI writes a schema for each kind of the document, with all definitions that it refers to.
func fromOpenAPI(dir string, text []byte) error {
	var document struct {
		Definitions map[string]object `json:"definitions"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return err
	}
	for name, definition := range document.Definitions {
		strict(definition)
		if strings.HasSuffix(name, ".resource.Quantity") {
			// The API server accepts a number such as `cpu: 1` as a quantity, but its document does not say so.
			definition["type"] = []string{"string", "number"}
		}
	}
	written := 0
	for name, definition := range document.Definitions {
		kinds, _ := definition["x-kubernetes-group-version-kind"].([]any)
		for _, entry := range kinds {
			kind, _ := entry.(object)
			needed := map[string]object{}
			collect(document.Definitions, name, needed)
			schema := object{"$ref": "#/definitions/" + name, "definitions": needed}
			if err := write(dir, textOf(kind["group"]), textOf(kind["version"]), textOf(kind["kind"]), schema); err != nil {
				return err
			}
			written++
		}
	}
	if written == 0 {
		return fmt.Errorf("no kind in it")
	}
	return nil
}

func textOf(value any) string {
	text, _ := value.(string)
	return text
}

// collect gathers a definition and all that it refers to.
func collect(all map[string]object, name string, needed map[string]object) {
	if _, known := needed[name]; known || all[name] == nil {
		return
	}
	needed[name] = all[name]
	var visit func(any)
	visit = func(node any) {
		switch node := node.(type) {
		case object:
			if reference, ok := node["$ref"].(string); ok {
				collect(all, strings.TrimPrefix(reference, "#/definitions/"), needed)
			}
			for _, child := range node {
				visit(child)
			}
		case []any:
			for _, child := range node {
				visit(child)
			}
		}
	}
	visit(all[name])
}

// fromDefinitions writes the schemas of custom resource definitions, several to a file.
func fromDefinitions(dir string, text []byte) error {
	written := 0
	for _, part := range bytes.Split(text, []byte("\n---")) {
		var definition struct {
			Kind string `json:"kind"`
			Spec struct {
				Group string `json:"group"`
				Names struct {
					Kind string `json:"kind"`
				} `json:"names"`
				Versions []struct {
					Name   string `json:"name"`
					Schema struct {
						OpenAPIV3Schema object `json:"openAPIV3Schema"`
					} `json:"schema"`
				} `json:"versions"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal(part, &definition); err != nil {
			return err
		}
		if definition.Kind != "CustomResourceDefinition" {
			continue
		}
		for _, version := range definition.Spec.Versions {
			schema := version.Schema.OpenAPIV3Schema
			strict(schema)
			// Metadata has a schema of its own in the API server.
			if properties, ok := schema["properties"].(object); ok {
				properties["metadata"] = object{"type": "object"}
			}
			if err := write(dir, definition.Spec.Group, version.Name, definition.Spec.Names.Kind, schema); err != nil {
				return err
			}
			written++
		}
	}
	if written == 0 {
		return fmt.Errorf("no CustomResourceDefinition in it")
	}
	return nil
}

// strict refuses unknown fields wherever fields are listed, and translates Kubernetes' extensions into JSON schema.
func strict(node any) {
	switch node := node.(type) {
	case object:
		_, named := node["properties"].(object)
		_, open := node["additionalProperties"]
		if named && !open && node["x-kubernetes-preserve-unknown-fields"] != true {
			node["additionalProperties"] = false
		}
		if node["format"] == "int-or-string" || node["x-kubernetes-int-or-string"] == true {
			node["type"] = []string{"string", "integer"}
		}
		for _, child := range node {
			strict(child)
		}
	case []any:
		for _, child := range node {
			strict(child)
		}
	}
}

func write(dir, group, version, kind string, schema object) error {
	if group == "" {
		group = version
	}
	folder := filepath.Join(dir, group, version)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	schema["$schema"] = "http://json-schema.org/draft-07/schema#"
	text, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, strings.ToLower(kind)+".json"), text, 0o644)
}
