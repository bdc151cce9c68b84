"""Private PyTorch APIs, one subject per file. Checked with torch 2.11 to 2.14.

No other module of this package uses a private API of Dynamo, AOTAutograd or Inductor, so that a new PyTorch release
changes these files alone. Import from the files; this module re-exports nothing.

    errors           how Dynamo shows an exception of a backend to the user
    dynamo           tracing a call, Dynamo's state, sizes that become dynamic
    recompiles       how many graphs Dynamo makes of one function, and what happens at the limit
    aot_autograd     Inductor's front half: AOTAutograd, decompositions and joint-graph passes
    decompositions   Inductor's table of decompositions
    compile_cache    entries of AOTAutogradCache and FxGraphCache
    inductor         Inductor's options, back half and marks on nodes
    cpp_kernels      the C++ compiler that Inductor starts for kernels on the CPU
    symbolic_sizes   size symbols and fake tensors for compiling one graph on its own
    tensors          tensor subclasses, fake tensors, views without checks
    storages         whether another tensor uses the same storage
    distributed      a process group without other processes, and tensors sharded among its ranks
    scoped           replacing an attribute of PyTorch while a block runs

`mom_passes.torch_compat` has what reading graphs, sizes and operators needs.
"""
