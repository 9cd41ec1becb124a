package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const dialLimit = 10 * time.Second

// forward hands connections from the machine to the node.
func forward(listener net.Listener, dial func() (net.Conn, error)) {
	for {
		outside, err := listener.Accept()
		if err != nil {
			log.Printf("accept: %v", err)
			time.Sleep(time.Second)
			continue
		}
		go func() {
			defer outside.Close()
			inside, err := dial()
			if err != nil {
				log.Printf("forward: %v", err)
				// A reset, not an orderly close: the client must see that nothing accepted the connection.
				outside.(*net.TCPConn).SetLinger(0) //nolint:errcheck // closed right after
				return
			}
			defer inside.Close()
			done := make(chan struct{})
			go func() { pipe(outside, inside); close(done) }()
			pipe(inside, outside)
			<-done
		}()
	}
}

func pipe(to, from net.Conn) {
	if _, err := io.Copy(to, from); err != nil && !errors.Is(err, net.ErrClosed) {
		// Pass a reset on as a reset.
		to.(*net.TCPConn).SetLinger(0) //nolint:errcheck // closed right after
		to.Close()
		return
	}
	to.(*net.TCPConn).CloseWrite() //nolint:errcheck // the other side may be gone
}

// dialer reaches an address of the node, or a ready pod behind a NodePort.
func dialer(to string) func() (net.Conn, error) {
	number, err := strconv.Atoi(to)
	if err != nil {
		return func() (net.Conn, error) { return net.DialTimeout("tcp", to, dialLimit) }
	}
	return nodePort(int32(number))
}

// nodePort connects to the ready pods of the Service that has this NodePort, as an ingress controller does. It bypasses the
// rules of kube-proxy: through them a few new connections failed while no pod came or went, and nothing showed whether a
// rule or a pod had refused them. It notices a terminating pod sooner than the rules do, so it proves less of the pods'
// graceful shutdown.
func nodePort(number int32) func() (net.Conn, error) {
	config, err := clientcmd.BuildConfigFromFlags("", data+"/pki/super-admin.conf")
	must(err, "read the administrator's kubeconfig")
	client, err := kubernetes.NewForConfig(config)
	must(err, "make a client")
	factory := informers.NewSharedInformerFactory(client, 0)
	factory.Core().V1().Services().Informer()
	factory.Discovery().V1().EndpointSlices().Informer()
	// Watches the API server as soon as it runs.
	factory.Start(context.Background().Done())
	return func() (net.Conn, error) {
		pods, err := readyPods(factory, number)
		if err != nil {
			return nil, err
		}
		return net.DialTimeout("tcp", pods[rand.IntN(len(pods))], dialLimit)
	}
}

func readyPods(factory informers.SharedInformerFactory, number int32) (pods []string, err error) {
	services, err := factory.Core().V1().Services().Lister().List(labels.Everything())
	if err != nil {
		return nil, err
	}
	for _, service := range services {
		for _, port := range service.Spec.Ports {
			if port.NodePort != number {
				continue
			}
			slices, err := factory.Discovery().V1().EndpointSlices().Lister().EndpointSlices(service.Namespace).
				List(labels.SelectorFromSet(labels.Set{discovery.LabelServiceName: service.Name}))
			if err != nil {
				return nil, err
			}
			pods = append(pods, ready(slices, port)...)
		}
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("no pod is ready behind NodePort %d", number)
	}
	return pods, nil
}

func ready(slices []*discovery.EndpointSlice, wanted core.ServicePort) (pods []string) {
	for _, slice := range slices {
		for _, port := range slice.Ports {
			if port.Name == nil || *port.Name != wanted.Name || port.Port == nil {
				continue
			}
			for _, endpoint := range slice.Endpoints {
				if endpoint.Conditions.Ready == nil || *endpoint.Conditions.Ready {
					pods = append(pods, net.JoinHostPort(endpoint.Addresses[0], strconv.Itoa(int(*port.Port))))
				}
			}
		}
	}
	return pods
}

type port struct{ host, node string }

type ports []port

func (p *ports) String() string { return fmt.Sprint(*p) }

func (p *ports) Set(text string) error {
	host, node, found := strings.Cut(text, "=")
	if !found {
		return errors.New("HOST:PORT=HOST:PORT or HOST:PORT=NODEPORT is wanted")
	}
	*p = append(*p, port{host, node})
	return nil
}
