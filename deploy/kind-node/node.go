package main

import (
	"bufio"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// In the node's mount namespace all paths are short and constant. So the files in config/ need no templating, and paths of
// unix sockets fit into 108 bytes wherever the clone is.
const (
	top  = "/run/chat-service-cluster"
	data = top + "/data"
)

// startNode starts the node: a process with its own PID, mount, network and IPC namespaces. When it dies, the kernel ends
// all of its processes and removes its mounts, bridges and packet filters, so nothing of it is left behind.
func startNode() {
	dir := flag.String("data", "", "what the node keeps")
	config := flag.String("config", "", "the folder with its configuration")
	var ports ports
	flag.Var(&ports, "port", "HOST=NODE: an address of the machine, and behind it an address of the node, or a NodePort")
	flag.Parse()
	// Opened outside: a socket stays in the network namespace that created it.
	var files []*os.File
	arguments := []string{"node-init", "-data", *dir, "-config", *config}
	for _, port := range ports {
		listener, err := net.Listen("tcp", port.host)
		must(err, "another cluster runs on this machine, or something else has the port")
		file, err := listener.(*net.TCPListener).File()
		must(err, "pass the socket on")
		files = append(files, file)
		arguments = append(arguments, "-port", port.host+"="+port.node)
	}
	node := exec.Command("/proc/self/exe", arguments...)
	node.ExtraFiles, node.Stdout, node.Stderr = files, os.Stdout, os.Stderr
	node.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
	}
	must(node.Start(), "make namespaces: it takes root with CAP_SYS_ADMIN")
}

// runNode is the node's first process.
func runNode() {
	dir := flag.String("data", "", "")
	config := flag.String("config", "", "")
	var ports ports
	flag.Var(&ports, "port", "")
	flag.Parse()
	log.SetFlags(log.LstdFlags | log.Lmicroseconds)
	lock(filepath.Join(*dir, "lock"))
	mountAll(*dir, *config)
	command("ip", "link", "set", "lo", "up")
	command("ip", "link", "add", "node", "type", "bridge")
	command("ip", "address", "add", "10.213.255.1/32", "dev", "node")
	command("ip", "link", "set", "node", "up")
	// kube-proxy rewrites the addresses of Services, 10.213.128.0/20; they only need some route.
	command("ip", "route", "add", "default", "dev", "node")
	set("/proc/sys/net/ipv4/ip_forward", "1")
	makeCgroups()
	makeCertificates()
	for i, port := range ports {
		// The listener holds a duplicate that the node's other programs do not inherit.
		file := os.NewFile(uintptr(3+i), port.host)
		listener, err := net.FileListener(file)
		must(err, "take the socket over")
		file.Close()
		go forward(listener, dialer(port.node))
	}
	for _, line := range procfile() {
		go keepRunning(line)
	}
	reap()
}

// Kept open, since closing it releases the lock.
var lockFile *os.File

// lock lets `cargo xtask cluster` find the node's process, without a PID file that could become stale.
func lock(path string) {
	var err error
	lockFile, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	must(err, "open the lock")
	exclusive := syscall.Flock_t{Type: syscall.F_WRLCK}
	must(syscall.FcntlFlock(lockFile.Fd(), syscall.F_SETLK, &exclusive), "this cluster runs already")
}

// Folders that some of the node's programs always write to.
var covered = []string{"/run", "/var/lib", "/var/log"}

func mountAll(dir, config string) {
	must(syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""), "make mounts private")
	must(syscall.Mount("proc", "/proc", "proc", 0, ""), "mount /proc")
	// Opened before mounting: the clone may be below a folder that a mount will hide.
	binds := map[string]*os.File{data: open(dir), top + "/config": open(config)}
	for _, folder := range covered {
		must(syscall.Mount("tmpfs", folder, "tmpfs", 0, "mode=755"), "cover "+folder)
	}
	for to, from := range binds {
		must(os.MkdirAll(to, 0o755), "make a mount point")
		path := fmt.Sprintf("/proc/self/fd/%d", from.Fd())
		must(syscall.Mount(path, to, "", syscall.MS_BIND, ""), "bind "+from.Name())
		from.Close()
	}
	for _, folder := range []string{"etcd", "pki", "logs", "volumes", "kubelet", "containerd"} {
		must(os.MkdirAll(filepath.Join(data, folder), 0o755), "make a folder")
	}
	// The kubelet's mounts must propagate to running containers.
	must(syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""), "make mounts shared")
}

func open(path string) *os.File {
	file, err := os.Open(path)
	must(err, "open a folder")
	return file
}

// makeCgroups creates the parent cgroup of all pods: in the single hierarchy of version 2, or in each hierarchy of version 1.
func makeCgroups() {
	const cgroups, ours = "/sys/fs/cgroup", "chat-service-cluster"
	if controllers, err := os.ReadFile(cgroups + "/cgroup.controllers"); err == nil {
		enable := "+" + strings.Join(strings.Fields(string(controllers)), " +")
		set(cgroups+"/cgroup.subtree_control", enable)
		must(os.MkdirAll(filepath.Join(cgroups, ours), 0o755), "make a cgroup")
		return
	}
	hierarchies, err := os.ReadDir(cgroups)
	must(err, "list the cgroups")
	for _, hierarchy := range hierarchies {
		must(os.MkdirAll(filepath.Join(cgroups, hierarchy.Name(), ours), 0o755), "make a cgroup")
	}
}

func makeCertificates() {
	config := "--config=" + top + "/config/kubeadm.yaml"
	phases := [][]string{{"certs", "ca"}, {"certs", "apiserver"}, {"certs", "apiserver-kubelet-client"},
		{"certs", "front-proxy-ca"}, {"certs", "front-proxy-client"}, {"certs", "sa"}}
	for _, user := range []string{"super-admin", "controller-manager", "scheduler", "kubelet"} {
		if _, err := os.Stat(data + "/pki/" + user + ".conf"); err != nil {
			phases = append(phases, []string{"kubeconfig", user, "--kubeconfig-dir=" + data + "/pki"})
		}
	}
	for _, phase := range phases {
		// kubeadm checks and keeps existing files.
		command("/proc/self/exe", append(append([]string{"kubeadm", "init", "phase"}, phase...), config)...)
	}
}

// process is one line of the Procfile: `name: command`.
type process struct{ name, command string }

func procfile() []process {
	file, err := os.Open(top + "/config/Procfile")
	must(err, "open the Procfile")
	defer file.Close()
	var all []process
	lines := bufio.NewScanner(file)
	joined := ""
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "#") {
			continue
		}
		if rest, more := strings.CutSuffix(line, "\\"); more {
			joined += rest
			continue
		}
		if name, command, found := strings.Cut(joined+line, ":"); found {
			all = append(all, process{name, strings.TrimSpace(command)})
		}
		joined = ""
	}
	must(lines.Err(), "read the Procfile")
	return all
}

// keepRunning restarts the process whenever it exits: at first the programs that it needs do not run yet, so it fails.
func keepRunning(p process) {
	output, err := os.OpenFile(data+"/logs/"+p.name+".log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	must(err, "open a log")
	words := strings.Fields(p.command)
	if _, ours := programs[words[0]]; ours {
		words = append([]string{"/proc/self/exe"}, words...)
	}
	for {
		run := exec.Command(words[0], words[1:]...)
		run.Stdout, run.Stderr = output, output
		run.Env = append(os.Environ(), "HOME="+top, "GOMAXPROCS=2")
		// With Go's default, the heaps of eight programs would fill a small machine.
		run.Env = append(run.Env, "GOGC=50")
		if done, err := start(run); err != nil {
			fmt.Fprintf(output, "start: %v\n", err)
		} else {
			<-done
			fmt.Fprintf(output, "%s: ended, starts again\n", time.Now().Format(time.RFC3339))
		}
		time.Sleep(time.Second)
	}
}

func set(path, value string) { must(os.WriteFile(path, []byte(value), 0o644), "write "+path) }

func command(name string, arguments ...string) {
	output, err := exec.Command(name, arguments...).CombinedOutput()
	must(err, fmt.Sprintf("%s %s: %s", name, strings.Join(arguments, " "), output))
}

func must(err error, what string) {
	if err != nil {
		log.Fatalf("%s: %v", what, err)
	}
}
