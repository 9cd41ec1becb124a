package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.starlark.net/starlark"
	"go.starlark.net/starlarkstruct"
	"go.yaml.in/yaml/v3"
)

// session holds the environment of the execution, and the calls that the file has made so far.
type session struct {
	context, namespace, subcommand, system, helm string
	arguments                                    []string

	settings *flag.FlagSet
	parsed   bool
	allowed  []string
	objects  []object
	locals   []local
	images   []image
	groups   []group
	charts   []chart
}

// signature describes a function of Tilt: its parameters in order, as `name` or `name?`, each with the type that it takes.
type signature struct {
	name       string
	parameters []parameter
	run        func(*session, arguments) (starlark.Value, error)
}

type parameter struct{ name, takes string }

type arguments map[string]starlark.Value

// The types of parameters: text, bool, int, words (text or a list of text), list (of text), map, command, any.
// In the order of Tilt v0.33: https://docs.tilt.dev/api.html
var signatures = []signature{
	{"version_settings", of("check_updates? bool", "constraint? text"), nil},
	{"analytics_settings", of("enable bool"), nil},
	{"ci_settings", of("k8s_grace_period? text", "timeout? text"), nil},
	{"config.define_string", of("name text", "args? bool", "usage? text"), defineString},
	{"config.define_bool", of("name text", "args? bool", "usage? text"), defineBool},
	{"config.parse", nil, parse},
	{"allow_k8s_contexts", of("contexts words"), allow},
	{"k8s_context", nil, func(s *session, _ arguments) (starlark.Value, error) { return starlark.String(s.context), nil }},
	{"k8s_namespace", nil, func(s *session, _ arguments) (starlark.Value, error) { return starlark.String(s.namespace), nil }},
	{"fail", of("msg text"), func(_ *session, a arguments) (starlark.Value, error) { return nil, fmt.Errorf("%s", a.text("msg")) }},
	{"local", of("command command", "quiet? bool", "command_bat? command", "echo_off? bool", "env? map", "dir? text", "stdin? any"), runLocal},
	{"local_resource", of("name text", "cmd? command", "deps? words", "trigger_mode? any", "resource_deps? list",
		"ignore? words", "auto_init? bool", "serve_cmd? command", "cmd_bat? command", "serve_cmd_bat? command",
		"allow_parallel? bool", "links? any", "labels? words", "env? map", "serve_env? map", "readiness_probe? any",
		"dir? text", "serve_dir? text"), localResource},
	{"custom_build", of("ref text", "command command", "deps list", "tag? text", "disable_push? bool",
		"skips_local_docker? bool", "live_update? list", "match_in_env_vars? bool", "ignore? words",
		"entrypoint? command", "container_args? list", "command_bat_val? text", "outputs_image_ref_to? text",
		"command_bat? command", "image_deps? list", "env? map", "dir? text"), customBuild},
	{"helm", of("paths text", "name? text", "namespace? text", "values? words", "set? words", "kube_version? text",
		"skip_crds? bool"), renderChart},
	{"k8s_yaml", of("yaml any", "allow_duplicates? bool"), addYaml},
	{"k8s_resource", of("workload? text", "new_name? text", "port_forwards? any", "extra_pod_selectors? any",
		"trigger_mode? any", "resource_deps? list", "objects? list", "auto_init? bool", "pod_readiness? text",
		"links? any", "labels? words", "discovery_strategy? text"), k8sResource},
	{"port_forward", of("local_port int", "container_port? int", "name? text", "link_path? text", "host? text"), keep("port_forward")},
	{"link", of("url text", "name? text"), keep("link")},
	{"encode_yaml", of("obj any"), encodeYaml},
	{"decode_yaml_stream", of("yaml any"), decodeYaml},
	{"read_file", of("file_path text", "default? text"), readFile},
	{"listdir", of("directory text", "recursive? bool"), listFolder},
	{"os.path.exists", of("path text"), func(_ *session, a arguments) (starlark.Value, error) {
		_, err := os.Stat(a.text("path"))
		return starlark.Bool(err == nil), nil
	}},
	{"os.path.basename", of("path text"), func(_ *session, a arguments) (starlark.Value, error) {
		return starlark.String(filepath.Base(a.text("path"))), nil
	}},
	{"shlex.quote", of("s text"), func(_ *session, a arguments) (starlark.Value, error) {
		return starlark.String("'" + strings.ReplaceAll(a.text("s"), "'", `'"'"'`) + "'"), nil
	}},
}

func of(parameters ...string) []parameter {
	var all []parameter
	for _, text := range parameters {
		name, takes, _ := strings.Cut(text, " ")
		all = append(all, parameter{name, takes})
	}
	return all
}

// builtins are all names that the file may use besides those of the language.
func (s *session) builtins() starlark.StringDict {
	names := starlark.StringDict{"TRIGGER_MODE_AUTO": starlark.String("auto"), "TRIGGER_MODE_MANUAL": starlark.String("manual")}
	modules := map[string]starlark.StringDict{
		"config":  {"tilt_subcommand": starlark.String(s.subcommand)},
		"shlex":   {},
		"os":      {},
		"os.path": {},
	}
	for _, signature := range signatures {
		function := starlark.NewBuiltin(signature.name, s.stand(signature))
		if at := strings.LastIndex(signature.name, "."); at >= 0 {
			modules[signature.name[:at]][signature.name[at+1:]] = function
		} else {
			names[signature.name] = function
		}
	}
	modules["os"]["path"] = &starlarkstruct.Module{Name: "os.path", Members: modules["os.path"]}
	delete(modules, "os.path")
	for name, members := range modules {
		names[name] = &starlarkstruct.Module{Name: name, Members: members}
	}
	s.settings = flag.NewFlagSet("tilt "+s.subcommand+" --", flag.ContinueOnError)
	s.settings.SetOutput(io.Discard)
	return names
}

// stand unpacks arguments as Tilt does, and checks their types.
func (s *session) stand(signature signature) func(*starlark.Thread, *starlark.Builtin, starlark.Tuple, []starlark.Tuple) (starlark.Value, error) {
	return func(_ *starlark.Thread, fn *starlark.Builtin, args starlark.Tuple, kwargs []starlark.Tuple) (starlark.Value, error) {
		values := make([]starlark.Value, len(signature.parameters))
		pairs := []any{}
		for i, parameter := range signature.parameters {
			pairs = append(pairs, parameter.name, &values[i])
		}
		if err := starlark.UnpackArgs(fn.Name(), args, kwargs, pairs...); err != nil {
			return nil, err
		}
		given := arguments{}
		for i, parameter := range signature.parameters {
			if values[i] == nil {
				continue
			}
			name := strings.TrimSuffix(parameter.name, "?")
			if !fits(parameter.takes, values[i]) {
				return nil, fmt.Errorf("%s: %s is a %s, and takes: %s", fn.Name(), name, values[i].Type(), parameter.takes)
			}
			given[name] = values[i]
		}
		if signature.run == nil {
			return starlark.None, nil
		}
		value, err := signature.run(s, given)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", fn.Name(), err)
		}
		return value, nil
	}
}

func fits(takes string, value starlark.Value) bool {
	_, isText := value.(starlark.String)
	_, isList := words(value)
	switch takes {
	case "text":
		return isText
	case "bool":
		_, is := value.(starlark.Bool)
		return is
	case "int":
		_, is := value.(starlark.Int)
		return is
	case "map":
		_, is := value.(*starlark.Dict)
		return is
	case "list":
		return isList && !isText
	case "words", "command":
		return isList
	}
	return true
}

// words are a text, or a list of texts.
func words(value starlark.Value) ([]string, bool) {
	if text, is := starlark.AsString(value); is {
		return []string{text}, true
	}
	sequence, is := value.(starlark.Sequence)
	if !is {
		return nil, false
	}
	all := []string{}
	for element := range starlark.Elements(sequence) {
		text, is := starlark.AsString(element)
		if !is {
			return nil, false
		}
		all = append(all, text)
	}
	return all, true
}

func (a arguments) text(name string) string {
	text, _ := starlark.AsString(a[name])
	return text
}

func (a arguments) words(name string) []string {
	if a[name] == nil {
		return []string{}
	}
	all, _ := words(a[name])
	return all
}

// flag is a boolean argument, or its default.
func (a arguments) flag(name string, otherwise bool) bool {
	if value, is := a[name].(starlark.Bool); is {
		return bool(value)
	}
	return otherwise
}

// command is a list of words, or a script for `sh -c`.
func (a arguments) command(name string) []string {
	if script, is := a[name].(starlark.String); is {
		return []string{"sh", "-c", string(script)}
	}
	return a.words(name)
}

// blob is text that stands for content, not for a path.
type blob string

func (blob) Type() string            { return "blob" }
func (b blob) String() string        { return string(b) }
func (blob) Freeze()                 {}
func (b blob) Truth() starlark.Bool  { return b != "" }
func (b blob) Hash() (uint32, error) { return starlark.String(b).Hash() }

// keep returns the arguments for the function that receives them.
func keep(constructor string) func(*session, arguments) (starlark.Value, error) {
	return func(_ *session, given arguments) (starlark.Value, error) {
		return starlarkstruct.FromStringDict(starlark.String(constructor), starlark.StringDict(given)), nil
	}
}

func defineString(s *session, given arguments) (starlark.Value, error) {
	s.settings.String(given.text("name"), "", given.text("usage"))
	return starlark.None, nil
}

func defineBool(s *session, given arguments) (starlark.Value, error) {
	s.settings.Bool(given.text("name"), false, given.text("usage"))
	return starlark.None, nil
}

// parse returns only the settings given on the command line.
func parse(s *session, _ arguments) (starlark.Value, error) {
	if err := s.settings.Parse(s.arguments); err != nil {
		return nil, err
	}
	if s.settings.NArg() > 0 {
		return nil, fmt.Errorf("positional arguments %q were given, and none are defined", s.settings.Args())
	}
	s.parsed = true
	found := starlark.NewDict(2)
	s.settings.Visit(func(set *flag.Flag) {
		var value starlark.Value = starlark.String(set.Value.String())
		if set.Value.(flag.Getter).Get() == true {
			value = starlark.True
		}
		_ = found.SetKey(starlark.String(set.Name), value)
	})
	return found, nil
}

func allow(s *session, given arguments) (starlark.Value, error) {
	s.allowed = append(s.allowed, given.words("contexts")...)
	return starlark.None, nil
}

// runLocal returns fixed output for the commands that the file may run. Tilt runs nothing before it knows that the cluster is
// allowed.
func runLocal(s *session, given arguments) (starlark.Value, error) {
	if !slices.Contains(s.allowed, s.context) {
		return nil, fmt.Errorf("nothing is run before allow_k8s_contexts has named %q", s.context)
	}
	switch command := strings.Join(given.command("command"), " "); command {
	case "uname -s":
		return blob(s.system + "\n"), nil
	default:
		return nil, fmt.Errorf("what should %q answer? Give it a stand-in", command)
	}
}

var testTemplate = regexp.MustCompile("(?m)^# Source: .*/tests/")

// renderChart runs helm with Tilt's arguments, and leaves tests out as Tilt does: by their path.
func renderChart(s *session, given arguments) (starlark.Value, error) {
	one := chart{Path: given.text("paths"), Values: given.words("values"), Set: given.words("set")}
	command := exec.Command(s.helm, "template", given.text("name"), one.Path, "--include-crds")
	for _, option := range []string{"namespace", "kube_version"} {
		if value := given.text(option); value != "" {
			command.Args = append(command.Args, "--"+strings.ReplaceAll(option, "_", "-"), value)
		}
	}
	for _, file := range one.Values {
		command.Args = append(command.Args, "--values", file)
	}
	for _, set := range one.Set {
		command.Args = append(command.Args, "--set", set)
	}
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(command.Args, " "), err, complaints.String())
	}
	s.charts = append(s.charts, one)
	kept := []string{}
	for _, document := range strings.Split(string(output), "---\n") {
		if !testTemplate.MatchString(document) {
			kept = append(kept, document)
		}
	}
	return blob(strings.Join(kept, "---\n")), nil
}

// content is the text of a blob, or of the file at a path.
func content(value starlark.Value) (string, error) {
	if path, is := starlark.AsString(value); is {
		text, err := os.ReadFile(path)
		return string(text), err
	}
	text, is := value.(blob)
	if !is {
		return "", fmt.Errorf("a %s, and neither a blob nor a path", value.Type())
	}
	return string(text), nil
}

func readFile(_ *session, given arguments) (starlark.Value, error) {
	text, err := os.ReadFile(given.text("file_path"))
	return blob(text), err
}

func listFolder(_ *session, given arguments) (starlark.Value, error) {
	entries, err := os.ReadDir(given.text("directory"))
	all := []starlark.Value{}
	for _, entry := range entries {
		// Tilt gives absolute paths, of files alone.
		path, _ := filepath.Abs(filepath.Join(given.text("directory"), entry.Name()))
		if !entry.IsDir() {
			all = append(all, starlark.String(path))
		}
	}
	return starlark.NewList(all), err
}

func encodeYaml(_ *session, given arguments) (starlark.Value, error) {
	value, err := fromStarlark(given["obj"])
	if err != nil {
		return nil, err
	}
	text, err := yaml.Marshal(value)
	return blob(text), err
}

func decodeYaml(_ *session, given arguments) (starlark.Value, error) {
	text, err := content(given["yaml"])
	if err != nil {
		return nil, err
	}
	documents, err := documents(text)
	if err != nil {
		return nil, err
	}
	all := []starlark.Value{}
	for _, document := range documents {
		all = append(all, toStarlark(document))
	}
	return starlark.NewList(all), nil
}

func documents(text string) ([]map[string]any, error) {
	decoder := yaml.NewDecoder(strings.NewReader(text))
	all := []map[string]any{}
	for {
		var one map[string]any
		if err := decoder.Decode(&one); err == io.EOF {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		if len(one) > 0 {
			all = append(all, one)
		}
	}
}

func fromStarlark(value starlark.Value) (any, error) {
	switch value := value.(type) {
	case starlark.String:
		return string(value), nil
	case starlark.Bool:
		return bool(value), nil
	case starlark.Int:
		number, _ := value.Int64()
		return number, nil
	case *starlark.List:
		all := []any{}
		for element := range starlark.Elements(value) {
			one, err := fromStarlark(element)
			if err != nil {
				return nil, err
			}
			all = append(all, one)
		}
		return all, nil
	case *starlark.Dict:
		all := map[string]any{}
		for key, element := range starlark.Entries(value) {
			name, is := starlark.AsString(key)
			one, err := fromStarlark(element)
			if err != nil || !is {
				return nil, fmt.Errorf("the key %s: %w", key, err)
			}
			all[name] = one
		}
		return all, nil
	}
	return nil, fmt.Errorf("a %s cannot become YAML", value.Type())
}

func toStarlark(value any) starlark.Value {
	switch value := value.(type) {
	case string:
		return starlark.String(value)
	case bool:
		return starlark.Bool(value)
	case int:
		return starlark.MakeInt(value)
	case float64:
		return starlark.Float(value)
	case []any:
		all := []starlark.Value{}
		for _, element := range value {
			all = append(all, toStarlark(element))
		}
		return starlark.NewList(all)
	case map[string]any:
		all := starlark.NewDict(len(value))
		for name, element := range value {
			_ = all.SetKey(starlark.String(name), toStarlark(element))
		}
		return all
	}
	return starlark.None
}
