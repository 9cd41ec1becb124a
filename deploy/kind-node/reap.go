package main

import (
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// The first process of a PID namespace inherits every orphan. One loop waits for all children and notifies who started them.
var (
	mutex   sync.Mutex
	waiting = map[int]chan struct{}{}
)

// start starts a child; the channel is closed when the child has exited.
func start(child *exec.Cmd) (<-chan struct{}, error) {
	// Held until the child is registered, so that an early exit is not missed.
	mutex.Lock()
	defer mutex.Unlock()
	if err := child.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	waiting[child.Process.Pid] = done
	return done, child.Process.Release()
}

func reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, 0, nil)
		if err != nil {
			// No children at the moment.
			time.Sleep(100 * time.Millisecond)
			continue
		}
		mutex.Lock()
		if done, known := waiting[pid]; known {
			delete(waiting, pid)
			close(done)
		}
		mutex.Unlock()
	}
}
