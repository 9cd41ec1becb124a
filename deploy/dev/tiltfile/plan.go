package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.starlark.net/starlark"
	"go.starlark.net/starlarkstruct"
)

// plan is what Tilt would do.
type plan struct {
	Resources []resource `json:"resources"`
	Images    []image    `json:"images"`
	Charts    []chart    `json:"charts"`
	// Every object that would be applied, as `kind/name`.
	Objects []string `json:"objects"`
	// The manifests of these objects, in the order of the file.
	Manifests []map[string]any `json:"manifests"`
}

// resource is a row in Tilt's display: objects of the cluster, or a command on this machine.
type resource struct {
	Name    string    `json:"name"`
	Needs   []string  `json:"needs"`
	Objects []string  `json:"objects,omitempty"`
	Command []string  `json:"command,omitempty"`
	Auto    bool      `json:"auto"`
	Ports   []forward `json:"ports,omitempty"`
	Labels  []string  `json:"labels"`
}

type forward struct{ Local, Container int }

type image struct {
	Ref              string   `json:"ref"`
	Command          []string `json:"command"`
	Deps             []string `json:"deps"`
	SkipsLocalDocker bool     `json:"skips_local_docker"`
	DisablePush      bool     `json:"disable_push"`
}

type chart struct {
	Path   string   `json:"path"`
	Values []string `json:"values"`
	Set    []string `json:"set"`
}

type local struct {
	resource
	deps []string
}

// group is a call of k8s_resource.
type group struct {
	workload, newName string
	resource
	selectors []string
}

type object struct {
	manifest              map[string]any
	kind, name, namespace string
	component, heldBy     string
	isWorkload            bool
}

var workloads = []string{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob", "Pod"}

// The form that Tilt's API server requires of names and labels.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)

func localResource(s *session, given arguments) (starlark.Value, error) {
	name := given.text("name")
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("%q is no name: letters, digits, '-', '.' and '_'", name)
	}
	for _, other := range s.locals {
		if other.Name == name {
			return nil, fmt.Errorf("%s is there already", name)
		}
	}
	if given["cmd"] == nil && given["serve_cmd"] == nil {
		return nil, fmt.Errorf("%s has no command", name)
	}
	auto := given.flag("auto_init", true)
	if mode, _ := starlark.AsString(given["trigger_mode"]); !auto && mode == "auto" {
		return nil, fmt.Errorf("%s: auto_init=False does not go with TRIGGER_MODE_AUTO", name)
	}
	one := local{deps: given.words("deps")}
	one.resource = resource{Name: name, Needs: given.words("resource_deps"), Command: given.command("cmd"), Auto: auto, Labels: given.words("labels")}
	s.locals = append(s.locals, one)
	return starlark.None, checkLabels(given)
}

func customBuild(s *session, given arguments) (starlark.Value, error) {
	if len(given.words("deps")) == 0 {
		return nil, fmt.Errorf("deps cannot be empty")
	}
	s.images = append(s.images, image{
		Ref:              given.text("ref"),
		Command:          given.command("command"),
		Deps:             given.words("deps"),
		SkipsLocalDocker: given.flag("skips_local_docker", false),
		DisablePush:      given.flag("disable_push", false),
	})
	return starlark.None, nil
}

func addYaml(s *session, given arguments) (starlark.Value, error) {
	text, err := content(given["yaml"])
	if err != nil {
		return nil, err
	}
	all, err := documents(text)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no object")
	}
	for _, manifest := range all {
		one := object{manifest: manifest, kind: at(manifest, "kind"), name: at(manifest, "metadata", "name")}
		one.namespace = at(manifest, "metadata", "namespace")
		one.component = at(manifest, "metadata", "labels", "app.kubernetes.io/component")
		one.isWorkload = slices.Contains(workloads, one.kind)
		if hook := at(manifest, "metadata", "annotations", "helm.sh/hook"); hook != "" {
			return nil, fmt.Errorf("%s/%s is a hook (%s): Tilt would apply it at once, and again each time", one.kind, one.name, hook)
		}
		for _, other := range s.objects {
			if other.kind == one.kind && other.name == one.name && other.namespace == one.namespace {
				return nil, fmt.Errorf("%s/%s is there twice", one.kind, one.name)
			}
		}
		s.objects = append(s.objects, one)
	}
	return starlark.None, nil
}

func k8sResource(s *session, given arguments) (starlark.Value, error) {
	one := group{workload: given.text("workload"), newName: given.text("new_name"), selectors: given.words("objects")}
	if one.workload == "" && (len(one.selectors) == 0 || one.newName == "") {
		return nil, fmt.Errorf("without a workload it takes objects and new_name")
	}
	if mode := given.text("pod_readiness"); !slices.Contains([]string{"", "wait", "ignore"}, mode) {
		return nil, fmt.Errorf("pod_readiness is wait or ignore, not %q", mode)
	}
	one.resource = resource{Name: one.newName, Needs: given.words("resource_deps"), Auto: given.flag("auto_init", true), Labels: given.words("labels")}
	if one.Name == "" {
		one.Name = one.workload
	}
	if !nameForm.MatchString(one.Name) {
		return nil, fmt.Errorf("%q is no name", one.Name)
	}
	if given["port_forwards"] != nil {
		list, is := given["port_forwards"].(*starlark.List)
		if !is {
			return nil, fmt.Errorf("port_forwards is to be a list of port_forward()")
		}
		for element := range starlark.Elements(list) {
			port, err := forwarded(element)
			if err != nil {
				return nil, err
			}
			one.Ports = append(one.Ports, port)
		}
	}
	s.groups = append(s.groups, one)
	return starlark.None, checkLabels(given)
}

func forwarded(value starlark.Value) (forward, error) {
	fields, is := value.(*starlarkstruct.Struct)
	if !is {
		return forward{}, fmt.Errorf("a port is forwarded by port_forward(), not by a %s", value.Type())
	}
	number := func(name string) int {
		field, err := fields.Attr(name)
		if err != nil {
			return 0
		}
		var port int
		_ = starlark.AsInt(field, &port)
		return port
	}
	return forward{number("local_port"), number("container_port")}, nil
}

func checkLabels(given arguments) error {
	for _, label := range given.words("labels") {
		if !nameForm.MatchString(label) || len(label) > 63 {
			return fmt.Errorf("%q is no label", label)
		}
	}
	return nil
}

// at is the text at a path in an object.
func at(value any, path ...string) string {
	for _, name := range path {
		fields, _ := value.(map[string]any)
		value = fields[name]
	}
	text, _ := value.(string)
	return text
}

// assemble makes the plan of objects and commands, and checks that it can work.
func (s *session) assemble() (*plan, error) {
	if !s.parsed && len(s.arguments) > 0 {
		return nil, fmt.Errorf("arguments are given, and config.parse() is not called")
	}
	if !slices.Contains(s.allowed, s.context) {
		return nil, fmt.Errorf("the context %q is not allowed", s.context)
	}
	all := &plan{Images: s.images, Charts: s.charts, Objects: []string{}}
	for _, one := range s.locals {
		all.Resources = append(all.Resources, one.resource)
	}
	for _, one := range s.groups {
		if err := s.hold(&one); err != nil {
			return nil, fmt.Errorf("k8s_resource %s: %w", one.Name, err)
		}
		all.Resources = append(all.Resources, one.resource)
	}
	for _, one := range s.objects {
		all.Objects = append(all.Objects, strings.ToLower(one.kind)+"/"+one.name)
		all.Manifests = append(all.Manifests, one.manifest)
		if one.isWorkload && one.heldBy == "" {
			all.Resources = append(all.Resources, resource{Name: one.name, Objects: []string{one.kind + "/" + one.name}, Auto: true})
		}
	}
	for _, check := range []func(*plan) error{s.checkDeps, checkNeeds, s.checkImages, s.checkPorts, s.checkJobs} {
		if err := check(all); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// hold assigns objects to a resource. No object may belong to two resources.
func (s *session) hold(one *group) error {
	take := func(matches func(object) bool, what string) error {
		var found []int
		for i, candidate := range s.objects {
			if matches(candidate) {
				found = append(found, i)
			}
		}
		if len(found) != 1 {
			return fmt.Errorf("%s is the name of %d objects, not of one", what, len(found))
		}
		taken := &s.objects[found[0]]
		if taken.heldBy != "" {
			return fmt.Errorf("%s belongs to %s already", what, taken.heldBy)
		}
		taken.heldBy = one.Name
		one.Objects = append(one.Objects, taken.kind+"/"+taken.name)
		return nil
	}
	if one.workload != "" {
		isNamed := func(o object) bool { return o.isWorkload && o.name == one.workload }
		if err := take(isNamed, one.workload); err != nil {
			return err
		}
	}
	for _, selector := range one.selectors {
		parts := append(strings.Split(selector, ":"), "", "")
		isSelected := func(o object) bool {
			return strings.EqualFold(parts[0], o.name) && (parts[1] == "" || strings.EqualFold(parts[1], o.kind)) &&
				(parts[2] == "" || strings.EqualFold(parts[2], o.namespace))
		}
		if err := take(isSelected, selector); err != nil {
			return err
		}
	}
	for _, taken := range one.Objects {
		if strings.HasPrefix(taken, "Service/") {
			return fmt.Errorf("%s: Tilt gives Services to the workload that they select by itself", taken)
		}
	}
	return nil
}

// checkDeps: every watched path exists, or is the output of a compile step.
func (s *session) checkDeps(*plan) error {
	made := map[string]bool{}
	for _, one := range s.locals {
		for i, word := range one.Command[:max(len(one.Command)-1, 0)] {
			if word == "--compile-to" {
				made[one.Command[i+1]] = true
			}
		}
	}
	watched := []string{}
	for _, one := range s.locals {
		watched = append(watched, one.deps...)
	}
	for _, one := range s.images {
		watched = append(watched, one.Deps...)
	}
	for _, path := range watched {
		path = filepath.Clean(path)
		// A file in target/ may be left over from an earlier build.
		if _, err := os.Stat(path); (err != nil || strings.HasPrefix(path, "target/")) && !made[path] {
			return fmt.Errorf("%s is watched, and it is not in the clone and nothing makes it", path)
		}
	}
	return nil
}

// checkNeeds: every dependency is a resource, and there are no cycles. A resource that starts automatically must not wait for
// one that is started by hand.
func checkNeeds(all *plan) error {
	byName := map[string]resource{}
	for _, one := range all.Resources {
		if _, twice := byName[one.Name]; twice {
			return fmt.Errorf("two resources are called %s", one.Name)
		}
		byName[one.Name] = one
	}
	done := map[string]bool{}
	var visit func(name string, way []string) error
	visit = func(name string, way []string) error {
		if slices.Contains(way, name) {
			return fmt.Errorf("resources wait for one another: %s", strings.Join(append(way, name), " -> "))
		}
		if done[name] {
			return nil
		}
		for _, need := range byName[name].Needs {
			other, is := byName[need]
			if !is {
				return fmt.Errorf("%s needs %s, which is no resource", name, need)
			}
			if byName[name].Auto && !other.Auto {
				return fmt.Errorf("%s needs %s, which waits to be started by hand", name, need)
			}
			if err := visit(need, append(way, name)); err != nil {
				return err
			}
		}
		done[name] = true
		return nil
	}
	for _, one := range all.Resources {
		if err := visit(one.Name, nil); err != nil {
			return err
		}
	}
	return nil
}

// checkImages: a container runs every image that is built, and the build uses the name that Tilt expects.
func (s *session) checkImages(all *plan) error {
	for _, built := range s.images {
		used := false
		for _, one := range s.objects {
			for _, ref := range containers(one.manifest, "image") {
				used = used || ref == built.Ref || strings.HasPrefix(ref, built.Ref+":") || strings.HasPrefix(ref, built.Ref+"@")
			}
		}
		if !used {
			return fmt.Errorf("nothing runs the image %s", built.Ref)
		}
		if !strings.Contains(strings.Join(built.Command, " "), "$EXPECTED_REF") {
			return fmt.Errorf("the image %s is not built under the name that Tilt expects", built.Ref)
		}
	}
	return nil
}

// containers are the values of a field of all containers of an object.
func containers(value any, field string) []string {
	found := []string{}
	switch value := value.(type) {
	case map[string]any:
		for name, inner := range value {
			if list, is := inner.([]any); is && (name == "containers" || name == "initContainers") {
				for _, one := range list {
					found = append(found, at(one, field))
				}
				continue
			}
			found = append(found, containers(inner, field)...)
		}
	case []any:
		for _, inner := range value {
			found = append(found, containers(inner, field)...)
		}
	}
	return found
}

// checkPorts: each local port is forwarded once, to a port that the workload has.
func (s *session) checkPorts(all *plan) error {
	seen := map[int]string{}
	for _, group := range s.groups {
		for _, port := range group.Ports {
			if other, twice := seen[port.Local]; twice {
				return fmt.Errorf("port %d is forwarded for %s and for %s", port.Local, other, group.Name)
			}
			seen[port.Local] = group.Name
			open := false
			for _, one := range s.objects {
				if one.isWorkload && one.name == group.workload {
					open = open || strings.Contains(fmt.Sprint(one.manifest), fmt.Sprintf("containerPort:%d ", port.Container))
				}
			}
			if !open {
				return fmt.Errorf("%s has no port %d", group.Name, port.Container)
			}
		}
	}
	return nil
}

// checkJobs: `tilt ci` waits for every Job, and would wait in vain for one that is deleted before Tilt has seen it finish.
func (s *session) checkJobs(*plan) error {
	for _, one := range s.objects {
		spec, _ := one.manifest["spec"].(map[string]any)
		seconds, limited := spec["ttlSecondsAfterFinished"].(int)
		if one.kind == "Job" && limited && seconds < 3600 {
			return fmt.Errorf("the Job %s is gone %d s after its end", one.name, seconds)
		}
	}
	return nil
}
